"""Trained networks for other programs: ONNX, TorchScript, torch.export and .safetensors files."""

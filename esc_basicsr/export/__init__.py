"""Trained networks for other programs: ONNX, OpenVINO IR, TorchScript, torch.export, .safetensors files."""

# versions of ONNX's operators that are written
OPSETS = range(17, 25)
DEFAULT_OPSET = 18

"""Trained networks for other programs: ONNX, OpenVINO IR, ncnn, TorchScript, torch.export, weights."""

# versions of ONNX's operators that are written
OPSETS = range(17, 25)
DEFAULT_OPSET = 18

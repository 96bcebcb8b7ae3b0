"""The ways to trace a model into an ONNX graph."""

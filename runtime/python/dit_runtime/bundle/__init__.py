"""The bundle on disk: its manifest, and engines made from its ONNX files."""

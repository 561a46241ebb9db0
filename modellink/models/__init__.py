"""Models are plain single-device PyTorch: nothing here knows a mesh, a flag or an accelerator."""

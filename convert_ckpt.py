"""The reference program `convert_ckpt.py`: its launch lines run unchanged, under `python` and under `torchrun`."""

from modellink.cli.main import program

if __name__ == "__main__":
    program("convert_ckpt")

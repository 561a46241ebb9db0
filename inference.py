"""The reference program `inference.py`: its launch lines run unchanged, under `python` and under `torchrun`."""

from modellink.cli.main import program

if __name__ == "__main__":
    program("inference")

"""The reference program `preprocess_data.py`: its launch lines run unchanged, under `python` and under `torchrun`."""

from modellink.cli.main import program

if __name__ == "__main__":
    program("preprocess_data")

"""The whole job on one machine: `make quickstart`, or `python -m modellink.quickstart`."""

"""The data build at its published size: `python -m benchmarks.build`, see `data_build.py`."""

from benchmarks.data_build import main

if __name__ == "__main__":
    main()

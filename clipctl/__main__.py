"""`python -m clipctl` is the same program as `clipctl`."""

from clipctl.cli import main

if __name__ == "__main__":
    main()

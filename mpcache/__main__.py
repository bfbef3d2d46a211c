"""`python -m mpcache`: the same as `mpcache`."""

from mpcache.cli import main

if __name__ == "__main__":
    main()

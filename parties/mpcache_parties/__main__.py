"""`python -m mpcache_parties`: the same as `mpcache-party`."""

from mpcache_parties.main import main

if __name__ == "__main__":
    main()

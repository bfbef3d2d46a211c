"""`mpcache-party`, and `python -m mpcache_parties`: ready for signals before the imports."""

from mpcache.console.start import begin


def main() -> None:
    """Begin, import the command line, and run it."""
    begin("mpcache-party")
    from mpcache_parties.main import main as run

    run()


if __name__ == "__main__":
    main()

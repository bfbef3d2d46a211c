"""`mpcache`, and `python -m mpcache`: ready for signals before the imports."""

from mpcache.console.start import begin


def main() -> None:
    """Begin, import the commands, and run one."""
    begin("mpcache")
    from mpcache.cli import main as run

    run()


if __name__ == "__main__":
    main()

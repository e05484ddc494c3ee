"""`python -m server` is `loramux`."""

from server.cli import main

if __name__ == "__main__":
    main()

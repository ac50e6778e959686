"""`python -m ctinstruct_hf.cli`, as torchrun starts it."""

from . import main

if __name__ == "__main__":
    main()

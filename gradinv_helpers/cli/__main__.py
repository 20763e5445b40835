"""``python -m gradinv_helpers.cli`` is the command ``gradinv``."""

from gradinv_helpers.cli import main

if __name__ == "__main__":
    main()

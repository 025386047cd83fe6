"""`python -m nsa_cli` is `nsa`."""

from nsa_cli.cli import main

main()

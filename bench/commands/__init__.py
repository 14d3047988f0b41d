"""The commands of `python -m bench`, and the options they share."""

"""How much the service bears, beside other ways to write it: see __main__.py for how to run it."""

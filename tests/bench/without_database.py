"""catvote itself, but for its database: each statement is answered at once, as if both cats had no votes yet.

gunicorn runs it with bare_settings.py, whose settings lack the hooks that open the pools.
"""

import catvote


def execute(*_, **__):
    return [("Gummi", 0), ("Pita", 0)]


catvote.execute = execute
app = catvote.app

"""Ctrl-C is as in a terminal: what a shell starts in the background ignores SIGINT, and its children with it."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)

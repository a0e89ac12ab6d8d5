"""What a bench found, a line a figure beside its limit; the exit code says whether all limits hold."""

import sys


class Figures:
    def __init__(self):
        self.missed = []

    def show(self, what, value, unit="", at_most=None, at_least=None, more=""):
        limit = f"at most {at_most:g}" if at_most is not None else f"at least {at_least:g}" if at_least is not None else ""
        print(f"{what:52} {value:10.3f} {unit:4} {f'({limit})' if limit else '':18} {more}".rstrip(), flush=True)
        if (at_most is not None and value > at_most) or (at_least is not None and value < at_least):
            self.missed.append(what)

    def end(self):
        print("missed: " + "; ".join(self.missed) if self.missed else "all within their limits")
        sys.exit(bool(self.missed))

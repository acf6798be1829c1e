"""How property tests are run: the same examples every time, and no deadline, since a slow machine is no failure."""

from hypothesis import settings

law = settings(derandomize=True, deadline=None, max_examples=300)

"""The command sharded as where memory allows and asks for it: `FORM=whole|reduced python -m tests.sharded WORDS`."""

import os
from typing import Any

from sidactl.__main__ import main
from sidactl.engine import configure
from sidactl.engine.sharding import ShardedForm

FORMS = {"whole": ShardedForm(has_whole_teacher=True), "reduced": ShardedForm(reduces_each_pass=True)}


def form_of(*arguments: Any) -> ShardedForm:
    """In place of `sharding.form_of`."""
    return FORMS[os.environ["FORM"]]


if __name__ == "__main__":
    vars(configure)["form_of"] = form_of
    main()

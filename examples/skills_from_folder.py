"""A folder of text files as skills: each is compiled once, kept in a store, and spliced in when a request needs it.

A skill reads nothing but itself while it is compiled. So each file has the field that its rules decide by.

Run it: python examples/skills_from_folder.py [FOLDER]
A second run with the same store compiles nothing again.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from programmable_kv import Model, Notebook, Skill, SkillStore, load_model

OPENING = "You are the support agent of an online shop. Reply with the action only."
VALUES = {"order_status": "shipped", "account_role": "verified"}
REQUESTS = {
    "cancellation": ("Somebody asks for a cancellation. What do you do?", ["cancel", "deny"]),
    "refund": ("Somebody asks for a refund. What do you do?", ["issue_refund", "escalate"]),
}


def compiled(model: Model, folder: Path, store: SkillStore, values: Mapping[str, str]) -> dict[str, Skill]:
    """A skill for every `.md` file of the folder, by the file's name. Skills in the store are not compiled again."""
    skills = {}
    for file in sorted(folder.glob("*.md")):
        text = file.read_text(encoding="utf-8")
        own = {name: value for name, value in values.items() if f"{{{name}}}" in text}
        skills[file.stem] = store.compile(model, text, own, name=file.stem)
    return skills


def main(model: Model, folder: Path, store: SkillStore, values: Mapping[str, str]) -> dict[str, str]:
    """Splice in the skill for each request, decide, and cut the skill out again; returns the decisions."""
    skills = compiled(model, folder, store, values)
    notebook = Notebook(model).message("system", OPENING)
    notebook.prefill()
    decided = {}
    for name, (request, options) in REQUESTS.items():
        spliced = notebook.splice(skills[name])
        decided[name] = notebook.decide(request, options).choice
        notebook.cut(name)
        print(f"{name}: {decided[name]}; {spliced.tokens_relocated} tokens spliced, {spliced.tokens_computed} computed")
    return decided


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "skills"
    main(load_model(), given, SkillStore(Path(tempfile.gettempdir()) / "pkv-example-skills"), VALUES)

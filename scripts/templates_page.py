"""`docs/templates.md`: what chat templates do with a notebook's messages, from the templates in `tests/templates/`."""

from __future__ import annotations

from pathlib import Path

from programmable_kv.notebook.survey import page, survey_of_text

_TEXT = """# Chat templates

A chat template is a program: it may drop a message, move it, rewrite it, or render earlier messages differently once another
follows. The library renders small conversations to find out what a template does. The text of a turn, an erratum or a policy
is then in the context once and in its place. Otherwise the library refuses the call with a `TemplateError` that says what the
template does.

`pkv template MODEL` prints the row of your model's template. The rows below are of templates written for the tests, in the
shapes of the families that they are named after (`tests/templates/`). A model's own template may be of another version.

{table}

- **system**: where a system message stands. *First user turn*: the template itself puts it there. *When asked*: the template
  has no place for a system message, and `Notebook(model, fold_system=True)` puts its text at the beginning of the first user
  turn (`Agent` does so by itself). You may prefill a notebook with the system message alone; it then ends where the first user
  turn begins.
- **mid-conversation**: whether a system message may stand after a user turn.
- **tool**: whether a tool's result may stand after an answer. *Apart from earlier turns*: the template would now render earlier
  turns differently; in the cache they stay as they were computed.
- **multi-turn**: *as rendered afresh*: a conversation that is continued turn by turn has the text of a fresh rendering.
  *Turns stay as computed*: it has another text, because the template changes earlier turns (it strips their thoughts, or moves
  the system message into the last user turn). The library renders only the new turn, and the account's `why` says so. *Opens a
  thought*: an answer begins after `<think>`. `generate` continues there; `decide` closes the thought first, because options are
  answers.
  (Qwen3 leaves the opening to the model: pass `template_kwargs={{"enable_thinking": False}}` before decisions.)
- **erratum**: how an edit after a user turn states the new value: as a system message, as a user message, or *inserted* in the
  form of a user message, if the template takes no second user message in a row. The plan's `why` says which.
- **agent**: whether `Agent` works. A template that writes in upper case takes only values in upper case. It would change any
  other value, so the library refuses that value.

The library does not cache what a template writes only at the very end of a conversation (an end-of-text token), because it
would stand in the middle once another turn follows.

## Requests in the shape that clients send

```python
notebook = Notebook.from_messages(
    model,
    [
        {{"role": "system", "content": "order_status: {{order_status}}"}},
        {{"role": "user", "content": [{{"type": "text", "text": "Where is it?"}}]}},
        {{
            "role": "assistant",
            "content": None,
            "tool_calls": [{{"id": "1", "type": "function", "function": {{"name": "find", "arguments": '{{"order": 7}}'}}}}],
        }},
        {{"role": "tool", "tool_call_id": "1", "content": "In Oslo."}},
    ],
    tools=[{{"type": "function", "function": {{"name": "find", "description": "Find an order.", "parameters": {{}}}}}}],
    fields={{"order_status": "pending", "today": "25 November 2026"}},
    template_kwargs={{"date_string": "{{today}}"}},  # a template's own date as a field: the next day is an edit
)
notebook.prefill()
notebook.edit(today="26 November 2026")
```

A template that asks the clock itself (gpt-oss, SmolLM3) takes the date as `template_kwargs={{"strftime_now": "{{today}}"}}`.

The library refuses tools that the template does not write, a tool call that it drops, and a field in a variable that it does
not read.

Values have types as everywhere ([prompts](prompts.md)): `"today": date(2026, 11, 25)` takes dates only. Most templates
write tools as JSON, so a field in a tool takes values without quotes, backslashes and line breaks. Special tokens in
contents, results, the arguments of calls and `reasoning_content` are plain text. In names, ids, keys, tools and
variables the library refuses them.
"""


def templates_page(folder: Path) -> str:
    """Return the page, with a row for every `.jinja` file in a folder."""
    rows = {path.stem: survey_of_text(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.jinja"))}
    return _TEXT.format(table="\n".join(page(rows)))

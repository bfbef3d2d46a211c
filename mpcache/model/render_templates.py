"""Render a chat template in a process of its own, which has little memory and little time.

A template is a program that came with a model. Jinja's sandbox keeps it from files and from Python; it does
not keep it from looping, or from doubling a string. This file is therefore run as a script (see `render` in
mpcache/model/chat_template.py): a request in JSON on stdin, the texts in JSON on stdout. It imports nothing
of mpcache, so that it starts at once.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_S = 3  # seconds of processor time
MEMORY = 1 << 30  # bytes of address space
LONGEST = 1 << 20  # characters of one rendered conversation


class _Generation(Extension):
    """Take {% generation %}, which marks the answers for training, as what it encloses."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as it is: the filter that Jinja brings escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def compiled(source: str) -> jinja2.Template:
    """Compile a template with what chat templates expect of their surroundings."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    sandbox.filters["tojson"] = _tojson
    sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return sandbox.from_string(source)


def rendered(request: dict[str, Any]) -> dict[str, Any]:
    """Render the request's `conversations` with its `source` and `tokens`.

    A conversation is a pair: the messages, and whether an answer is to be generated. Returns `texts`, one for
    each: [text, ""] or ["", why there is none]; or `error`, where the template is none.
    """
    try:
        template = compiled(request["source"])
    except (jinja2.TemplateError, RecursionError) as error:
        return {"error": f"line {getattr(error, 'lineno', '?')}: {error}"}
    texts = []
    for messages, generate in request["conversations"]:
        try:
            text = template.render(
                messages=messages, add_generation_prompt=generate, tools=None, documents=None,
                **request["tokens"],
            )  # fmt: skip
        except MemoryError:
            raise
        except Exception as error:  # whatever a template's own code makes of these messages
            texts.append(["", str(error) or type(error).__name__])
        else:
            texts.append([text, ""] if len(text) <= LONGEST else ["", f"it makes {len(text)} characters"])
    return {"texts": texts}


def main() -> None:
    """Answer one request."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    request = json.load(sys.stdin)
    try:
        answer = json.dumps(rendered(request))
    except MemoryError:
        answer = json.dumps({"error": f"it takes more than {MEMORY >> 20} MiB of memory"})
    sys.stdout.write(answer)


if __name__ == "__main__":
    main()

"""`mpcache pack`: read a document once, evict, and keep what stays of it in a file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from mpcache.config import load_settings
from mpcache.console import terminal
from mpcache.console.options import (
    ConfigOption,
    ContextOption,
    DocumentAsOption,
    JsonOption,
    ModelOption,
    PackKeyOption,
    PackPassphraseOption,
    PolicyOption,
    RawOption,
    chat_overrides,
)
from mpcache.errors import BadInput
from mpcache.limits import with_default_policy
from mpcache.report.units import duration, size
from mpcache_parties.packing import make_pack
from mpcache_parties.private_inputs import read_document
from mpcache_parties.state.packs import PackLock, write_pack


def pack_document(
    out: Annotated[Path, typer.Option(help="The pack that is written.")],
    model: ModelOption = None,
    context: ContextOption = None,
    config: ConfigOption = None,
    policy: PolicyOption = None,
    raw: RawOption = False,
    document_as: DocumentAsOption = None,
    pack_key: PackKeyOption = None,
    pack_passphrase: PackPassphraseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a document once, evict, and write what stays of it: `--document FILE` serves it without a prefill.

    With --pack-key (made if there is none) or --pack-passphrase the file is sealed. Without, it is as private
    as the document: what stays of a cache tells what the text says.
    """
    lock = PackLock(pack_key, pack_passphrase)
    lock.check()
    if not out.parent.is_dir():
        raise BadInput(f"--out {out}: there is no folder {out.parent}")
    settings = load_settings(config, {"public.policy": policy} | chat_overrides(raw, document_as))
    public = with_default_policy(settings, model, False, context, terminal.say).public
    start = time.perf_counter()
    with terminal.progress("reading the model ...") as (say, _):
        own = read_document(model, context, public)
        pack = make_pack(own, public, say)
        written = write_pack(out, pack, lock)
    ms = 1000 * (time.perf_counter() - start)
    kept = sum(part.k.shape[0] * part.k.shape[1] for parts in pack.context.layers for part in parts)
    kept //= own.model.shape.kv_heads * own.model.shape.layers
    told = {
        "pack": str(out), "policy": pack.context.spec, "context_tokens": own.length, "kept_tokens": kept,
        "bytes": written, "sealed": lock.kind or None, "ms": ms, "model_digest": own.model.digest,
    }  # fmt: skip
    if as_json:
        print(json.dumps(told))
        return
    if own.note:
        terminal.say(own.note)
    how = f"sealed with a {lock.kind}" if lock.kind else "not sealed: as private as the document itself"
    terminal.say(f"wrote {out} in {duration(ms)}: {own.length} tokens, {kept} kept, {size(written)}, {how}")

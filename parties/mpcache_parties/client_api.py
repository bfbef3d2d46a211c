"""Serve the client's endpoint, `mpcache-party --rank 1 --api`: each conversation is a client process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpcache.console.inputs import read_text
from mpcache.console.signals import stop_on_signals
from mpcache.errors import BadInput
from mpcache.rank import Rank
from mpcache_parties.chat import Chat, connect
from mpcache_parties.endpoint.chat_like import models_of
from mpcache_parties.endpoint.endpoint_options import EndpointOptions
from mpcache_parties.party_options import PartyOptions
from mpcache_parties.say import Say

AT_ONCE = 2  # conversations: server and dealer must serve as many sessions


@dataclass(frozen=True)
class ClientApi:
    """Flags of the endpoint, as they were given."""

    address: str
    api_key: Path | None = None
    conversations: int = AT_ONCE

    def serve(self, options: PartyOptions, say: Say) -> None:
        """Serve until a signal ends this process. Raises BadInput, PortInUse, or Stopped."""
        if options.me is not Rank.CLIENT:
            raise BadInput(f"--api belongs to the client (--rank 1), this is the {options.me.label}")
        if options.config is None:
            raise BadInput("--api asks the parties that a config names; give --config FILE")
        if options.question is not None or options.question_file is not None:
            raise BadInput("--api takes questions from its callers; leave --question out")
        endpoint = EndpointOptions(self.address, self.api_key)
        endpoint.check()
        config, identity, names = options.config, options.identity, options.named_documents()
        own = None if options.context is None else read_text(options.context)

        def open_chat(document: str, say: Say) -> Chat:
            return connect(
                config, identity, say, insecure=options.insecure, document=document, private_context=own
            )

        stop_on_signals("client")
        endpoint.serve(models_of("mpcache", names, open_chat), self.conversations, say)

"""What an agent is given: where its calls go, and the variables that SDKs read it from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from learner.servers.credentials import ssl_context
from shared import wire
from shared.errors import InvalidRequest
from shared.sessions import SessionOpened

#: Some programs read the one, some the other.
_NO_PROXY = ("NO_PROXY", "no_proxy")


@dataclass(frozen=True)
class AgentSession:
    """A session of a rollout server, as an agent sees it.

    Example:
        async def agent(session, row):
            client = session.openai()
            answer = await client.chat.completions.create(model=session.model, messages=row["prompt"])
            return float(row["answer"] in answer.choices[0].message.content)

    Attributes:
        session_id: of the server.
        server_url: of the server.
        base_url: of the OpenAI routes, for any SDK: `{base_url}/chat/completions`.
        api_key: opens this session and nothing else.
        model: a name that requests may give; whatever they give, the session's policy answers.
        ca_file: CA of the server's certificate; None: a public one.
        timeout_s: how long the agent may take, in seconds.
    """

    session_id: str
    server_url: str
    base_url: str
    api_key: str = field(repr=False)
    model: str = "policy"
    ca_file: str | None = None
    timeout_s: float = 600.0
    is_async: bool = True

    @classmethod
    def of(cls, opened: SessionOpened, url: str, **known: Any) -> AgentSession:
        """Return the session that a server at `url` has opened."""
        return cls(opened.session_id, url, f"{url}{opened.path}", opened.token, **known)

    @property
    def url(self) -> str:
        """Address of the session itself: `{url}/reward` takes a reward, where the learner allows it."""
        return self.server_url + wire.SESSION.format(session_id=self.session_id)

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables that the SDKs of OpenAI and Anthropic read, the CA that they trust, and hosts without proxy.

        The learner reaches its servers through no proxy either.
        """
        direct = dict.fromkeys(_NO_PROXY, _with_host(self.server_url))
        own_ca = {"SSL_CERT_FILE": self.ca_file, "NODE_EXTRA_CA_CERTS": self.ca_file} if self.ca_file else {}
        return {
            "OPENAI_BASE_URL": self.base_url,
            "OPENAI_API_KEY": self.api_key,
            "OPENAI_MODEL": self.model,
            # Anthropic's SDK writes the /v1 itself.
            "ANTHROPIC_BASE_URL": self.base_url.removesuffix("/v1"),
            "ANTHROPIC_API_KEY": self.api_key,
            "ANTHROPIC_AUTH_TOKEN": self.api_key,
            "ANTHROPIC_MODEL": self.model,
            **direct,
            **own_ca,
        }

    def openai(self, **options: Any) -> Any:
        """Return a client of the openai SDK: `AsyncOpenAI` for an agent that is `async`, else `OpenAI`.

        Args:
            options: of the client.

        Raises:
            InvalidRequest: the SDK is not installed.
        """
        try:
            import openai
        except ImportError as error:
            raise InvalidRequest(
                "session.openai() needs the openai package: install it (pip install openai), or send requests to "
                "session.base_url with session.api_key"
            ) from error
        plain, later = (openai.OpenAI, openai.DefaultHttpxClient), (openai.AsyncOpenAI, openai.DefaultAsyncHttpxClient)
        make, http = later if self.is_async else plain
        if "http_client" not in options:  # as the learner's own, which goes through no proxy of $HTTP_PROXY
            options["http_client"] = http(verify=ssl_context(self.ca_file), trust_env=False)
        # A call that is sent again is sampled again, and would be a conversation of its own.
        defaults = {"base_url": self.base_url, "api_key": self.api_key, "max_retries": 0, "timeout": self.timeout_s}
        return make(**{**defaults, **options})


def _with_host(url: str) -> str:
    """Return the hosts that this process reaches without a proxy, with that of `url`."""
    hosts = [host.strip() for name in _NO_PROXY for host in os.environ.get(name, "").split(",") if host.strip()]
    return "*" if "*" in hosts else ",".join(dict.fromkeys([*hosts, urlsplit(url).hostname or ""]))

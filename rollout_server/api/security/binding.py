"""Addresses that this server may be bound to, and with which protection; checked before the model is loaded."""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
from typing import Any

from rollout_server.api.security.bearer_tokens import Tokens
from rollout_server.settings import ServerSettings
from shared.bearer_tokens import TOKEN_VARIABLE, is_loopback
from shared.errors import InvalidRequest
from shared.local_access import LocalAccess

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")

logger = logging.getLogger("lockstep.api")


def check(args: Any, settings: ServerSettings, tokens: Tokens | None) -> None:
    """Refuse flags that would leave the server open, or only seem to protect it.

    Raises:
        LockstepError: `invalid_request`, with what to do instead.
    """
    if args.api_key or os.environ.get("VLLM_API_KEY"):
        raise InvalidRequest(
            "--api-key and $VLLM_API_KEY protect some of vLLM's paths and none of this server's: use --token-file or "
            f"${TOKEN_VARIABLE}"
        )
    _check_tls(args)
    _named_hosts(settings)
    if tokens is None and "*" in (getattr(args, "allowed_origins", None) or ()):
        logger.warning("ANY page in a browser that reaches this server may generate on it (--allowed-origins *)")
    if is_loopback(args.host):
        return
    if tokens is None and not settings.allow_unauthenticated:
        raise InvalidRequest(
            f"--host {args.host} can be reached from other machines, and no token is set: whoever reaches it could "
            "replace the weights. Give --token-file FILE (`umask 077; openssl rand -hex 32 > FILE`) or "
            f"${TOKEN_VARIABLE}; or, where nobody else can reach it, --allow-unauthenticated"
        )
    if tokens is None:
        logger.warning(
            "ANYONE who reaches %s:%s may use this server and replace the weights it serves (--allow-unauthenticated)",
            args.host,
            args.port,
        )
    elif not args.ssl_certfile:
        logger.warning(
            "tokens, prompts and completions cross the network unencrypted: give --ssl-certfile and --ssl-keyfile, "
            "unless something in front of this server encrypts"
        )


def local_access(args: Any, settings: ServerSettings) -> LocalAccess:
    """Return what a server without tokens answers to, by names of its operator, and beyond loopback by its own."""
    names = _named_hosts(settings)
    if settings.allow_unauthenticated and not is_loopback(args.host):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    return LocalAccess(args.host, frozenset(names))


def _named_hosts(settings: ServerSettings) -> set[str]:
    names = {name.strip().lower().removesuffix(".") for name in settings.allowed_hosts.split(",") if name.strip()}
    if wrong := sorted(name for name in names if not _NAME.fullmatch(name)):
        raise InvalidRequest(
            f"--allowed-hosts: {wrong[0]} is no name of a host; give names alone, without scheme, port or wildcard, as "
            "in gpu-1.corp.example,rollout.prod.svc"
        )
    return names


def tls_options(args: Any) -> dict[str, Any]:
    """Return vLLM's TLS flags as uvicorn's options."""
    names = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_ciphers")
    given = {name: getattr(args, name, None) for name in names}  # older vLLM versions have no --ssl-ciphers
    return {name: value for name, value in given.items() if value is not None}


def _check_tls(args: Any) -> None:
    """Load key and certificate once, so that a wrong path is reported before the model is loaded."""
    if args.ssl_cert_reqs:
        raise InvalidRequest(
            "--ssl-cert-reqs: learners prove themselves with a token, not with a certificate; leave it out, or let a "
            "proxy in front of this server and of the learner see to mutual TLS"
        )
    if not args.ssl_certfile:
        if args.ssl_keyfile or args.ssl_ca_certs:
            raise InvalidRequest(
                "TLS needs a certificate: give --ssl-certfile, and --ssl-keyfile unless the key is in it"
            )
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile or None, password=_no_password)
        if args.ssl_ca_certs:
            context.load_verify_locations(args.ssl_ca_certs)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise InvalidRequest(
            f"TLS cannot work with --ssl-certfile {args.ssl_certfile}, --ssl-keyfile {args.ssl_keyfile}, "
            f"--ssl-ca-certs {args.ssl_ca_certs}: {error}"
        ) from error


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one that is not")

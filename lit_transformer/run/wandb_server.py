"""Is there a W&B server for this user, and does it answer? If not, a run is kept offline."""

import netrc
import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

_FORMER_HOST = "api.wandb.ai"  # for which keys of earlier versions are stored; those are good for the present one too
_SECONDS = 3.0


def why_offline() -> str | None:
    """What keeps a run from the server, or None.

    Without this W&B would ask for a key, or wait for the server: 90 seconds when the run begins, and two minutes when
    the process ends.

    Raises:
        ModuleNotFoundError: If ``wandb`` is not installed.

    Cost: three seconds at most.
    """
    mode = os.environ.get("WANDB_MODE")
    if mode == "disabled":
        return None
    if mode in ("offline", "dryrun"):
        return "WANDB_MODE says so"
    own = os.environ.get("WANDB_BASE_URL")
    server = urlsplit(own or _default_server())
    hosts = [server.netloc] if own else [server.netloc, _FORMER_HOST]
    if not os.environ.get("WANDB_API_KEY") and not any(map(_has_key, hosts)):
        return "there is no API key; wandb login asks for one"
    if not getproxies() and not _answers(server.hostname or "", server.port or {"http": 80}.get(server.scheme, 443)):
        return f"{server.hostname} does not answer"
    return None


def _default_server() -> str:
    import wandb

    return str(wandb.Settings().base_url)


def _has_key(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except OSError:
        return False
    return True

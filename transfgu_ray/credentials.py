"""URIs hold no passwords: they are kept in configurations and manifests, and shown by MLflow, reports and logs."""

import re

from transfgu_ray.errors import ConfigError

# KEY:SECRET@ of any scheme, where a secret may hold slashes; digits and a slash after the colon are a port.
_PASSWORD = re.compile(r"://[^/@\s]*:(?!\d+/)[^@]*@")
# Before an @ the web knows nothing but who logs in: TOKEN@ is as good as a password.
_LOGIN = re.compile(r"https?://[^/@\s]+@")
_PARAMETER = re.compile(r"[?&][^=&#]*(passw|pwd|secret|token|credential|signature|api.?key)[^=&#]*=|[?&]sig=", re.I)


def refuse_credentials(name: str, value: str) -> None:
    """Refuses a URI that holds a password, a key or a token.

    Args:
        name: of the setting, for the message, which does not repeat the value.
        value: any text; what is no URI passes.

    Raises:
        ConfigError: it holds one.
    """
    if "://" in value and any(each.search(value) for each in (_PASSWORD, _LOGIN, _PARAMETER)):
        raise ConfigError(
            f"{name} holds a password, a key or a token, which would be kept with the results; leave it out of the URI "
            "and set it in the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or "
            "MLFLOW_TRACKING_TOKEN for a tracking server, PGPASSWORD for PostgreSQL, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY for S3"
        )

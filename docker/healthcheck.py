"""The image's HEALTHCHECK: is the service ready? Exits 0 if so, else 1 with what /readyz said."""

import http.client
import os
import sys

TIMEOUT_S = 3


def main() -> int:
    """Ask /readyz of the service in this container, and print what is not ready, for `docker inspect`."""
    port = int(os.environ.get("BLN_SERVE_PORT") or 8000)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        sys.stdout.write(response.read().decode())
    except OSError as error:
        sys.stdout.write(f"no answer on port {port}: {error}")
        return 1
    return 0 if response.status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main())

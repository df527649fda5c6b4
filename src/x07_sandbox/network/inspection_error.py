"""The error that the parsers of a client's bytes raise."""


class InspectionError(Exception):
    """The client's bytes are not allowed, and the connection must be closed.

    rule: a stable id, such as ``tls:no-sni``. reason: a clause with the client's text escaped and truncated.
    name: the name that the client sent, in normal form if it is valid, else escaped; "" if the client sent no name.
    """

    def __init__(self, rule: str, reason: str, name: str = "") -> None:
        super().__init__(rule, reason, name)
        self.rule = rule
        self.reason = reason
        self.name = name

"""The one error a user sees: `[where] rule, but got value. Context. Hint.`, or `[where] what failed. Context. Hint.`"""


class HandgradError(Exception):
    """A mistake that the user can correct, as a one-line message.

    where: the op, file or stage
    rule, got: for a value, what must hold and what was found instead; for a state, what failed, without `got`

    The command line prints it and exits with status 2.

    >>> print(HandgradError("data", "token shards start with magic 20240520", 7, hint="handgrad data text FILE"))
    [data] token shards start with magic 20240520, but got 7. hint: handgrad data text FILE
    >>> print(HandgradError("cuda", "no NVIDIA driver found: libcuda.so.1 is missing", hint="backend 'cpu'"))
    [cuda] no NVIDIA driver found: libcuda.so.1 is missing. hint: backend 'cpu'
    """

    def __init__(self, where: str, rule: str, got: object = None, *, context: str = "", hint: str = ""):
        text = f"[{where}] {rule}"
        if got is not None:
            text += f", but got {got}"
        text += "."
        if context:
            text += f" {context}."
        if hint:
            text += f" hint: {hint}"
        super().__init__(text)
        self.where, self.rule, self.got, self.hint = where, rule, got, hint

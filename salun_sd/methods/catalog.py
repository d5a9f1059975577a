"""The methods by name."""

from salun_sd.methods.loop import Method
from salun_sd.methods.salun import SalUn

METHODS: dict[str, type[Method]] = {"salun": SalUn}

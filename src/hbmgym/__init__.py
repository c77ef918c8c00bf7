"""hbmgym: learn how GPU memory is divided between KV cache and recurrent state."""

from hbmgym.envs.registration import register_environments
from hbmgym.private import settle_matplotlib

register_environments()
settle_matplotlib()

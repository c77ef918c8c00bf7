"""hbmgym: learn how GPU memory is divided between KV cache and recurrent state."""

from hbmgym.envs.registration import register_environments

register_environments()

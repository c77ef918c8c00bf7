"""hbmgym: learn how GPU memory is divided between KV cache and recurrent state."""

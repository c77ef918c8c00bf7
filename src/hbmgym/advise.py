"""Which split to set for a model, a GPU and traffic: `python -m hbmgym.advise --help`.

The name under which eval/advise.py is run where hbmgym is installed and nobody sees its folders.
"""

from hbmgym.eval.advise import main

if __name__ == "__main__":
    main()

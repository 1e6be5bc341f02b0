"`python -m latentdiff VERB ...` is `latentdiff-VERB ...`, for where the commands are not on the PATH"
import sys
from latentdiff import commands
from latentdiff.disk import UserError, one_line_errors, printable

VERBS = {k.removesuffix('_cli'): f for k, f in vars(commands).items() if k.endswith('_cli')}

@one_line_errors
def list_cli():
    print('usage: python -m latentdiff VERB [options]; VERB --help lists the options\n')
    for k, f in VERBS.items(): print(f'  {k:8} {f.__doc__}')

def chosen():
    "The command that the first argument names, to find its options in the rest; without one, or with --help, a list"
    verb, *options = sys.argv[1:] or ['--help']
    if verb in ('-h', '--help'):
        list_cli()
        sys.exit()
    if verb not in VERBS:
        why = UserError(f"python -m latentdiff: no verb '{verb}', only {', '.join(VERBS)}")   # which shortens words
        sys.exit(printable(str(why)))
    sys.argv = [f'latentdiff-{verb}', *options]
    return VERBS[verb]

if __name__ == '__main__': chosen()() # `call_parse` looks at sys.argv if the script itself calls, not a function of it

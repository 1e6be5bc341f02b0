"""Real processes without the seconds that it takes to import torch: a server imports it once, and forks a child for each program.
A child runs its program as the interpreter would: an environment, a folder, arguments, streams and an exit code of its own."""
import contextlib, json, os, random, signal, subprocess, sys, threading
from pathlib import Path
from fastcore.basics import AttrDict

ROOT = Path(__file__).parents[1]

SERVER = '''
import atexit, gc, json, os, runpy, signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell ignores it for what runs in the background
import latentdiff.commands, latentdiff.denoisers, latentdiff.labs_data, latentdiff.report
if sys.argv[1:]:
    sys.path.insert(0, sys.argv[1])
    import memory
    sys.path.pop(0)
    memory.remember(sys.argv[2])
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.environ.clear()
        os.environ.update(job['env'])
        os.chdir(job['cwd'])
        for path, fd in ((os.devnull, 0), (job['out'], 1), (job['err'], 2)):
            os.dup2(os.open(path, os.O_RDWR|os.O_CREAT|(os.O_TRUNC if fd else 0)), fd)
        torch.set_num_threads(torch.get_num_threads())   # makes torch's pool of threads anew; two threads at once would quarrel over that
        sys.argv = [job['script'], *job['args']]
        code = 0
        try: runpy.run_path(job['script'], run_name='__main__')
        except SystemExit as e:
            if isinstance(e.code, str): print(e.code, file=sys.stderr)
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''

def command(folder, verb, before=''):
    "A console script, as the installed ones look; it does `before` first"
    script = folder/f'latentdiff-{verb}'
    script.write_text(f'import sys\n{before}\nfrom latentdiff.commands import {verb}_cli\nif __name__ == "__main__": sys.exit({verb}_cli())\n')
    return script

class Server:
    "Runs programs one at a time, each in a child of a process that has imported the library"
    def __init__(self, tmp, memory=None): # folders: of its own; where programs find what others have found out, see memory.py
        self.tmp, remember = tmp, [Path(__file__).parent, memory] if memory else []
        program = tmp/'server.py'   # a file, as commands are: one of -c would look for modules in the current folder
        program.write_text(SERVER)
        self.process = subprocess.Popen([sys.executable, '-W', 'ignore', program, *remember], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
                                        cwd=tmp, env=os.environ | dict(PYTHONPATH=str(ROOT)))

    def start(self, script, *args, cwd=None, **env):
        "The pid of a child that runs the file `script`; `wait` for it before the next"
        job = dict(script=str(script), args=[str(a) for a in args], cwd=str(cwd or self.tmp), env=os.environ | dict(PYTHONPATH=str(ROOT)) | env,
                   out=str(self.tmp/'out'), err=str(self.tmp/'err'))
        print(json.dumps(job), file=self.process.stdin, flush=True)
        self.pid = int(self.process.stdout.readline())
        return self.pid

    def wait(self, seconds=None):
        "AttrDict(rc, out, err) of the child; after so many `seconds` it is killed, and rc is -SIGKILL"
        timer = threading.Timer(seconds, self.kill) if seconds else None
        if timer: timer.start()
        rc = int(self.process.stdout.readline())
        if timer: timer.cancel()
        return AttrDict(rc=rc, out=(self.tmp/'out').read_text(), err=(self.tmp/'err').read_text())

    def alive(self):
        try: os.kill(self.pid, 0)
        except ProcessLookupError: return False
        return True

    def kill(self): self.signal(signal.SIGKILL)

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError): os.kill(self.pid, number)

    @contextlib.contextmanager
    def starved(self, seed=0):
        """Children are stopped again and again for random times, a quarter of all. Like beside busy processes some steps last far longer than
        others, but on any number of cores, and nothing is taken from other workers."""
        over, rng = threading.Event(), random.Random(seed)
        def now_and_then():
            while not over.wait(rng.uniform(0, .6)):
                self.signal(signal.SIGSTOP)
                over.wait(rng.uniform(0, .2))
                self.signal(signal.SIGCONT)
        thread = threading.Thread(target=now_and_then, daemon=True)
        thread.start()
        try: yield
        finally:
            over.set()
            thread.join()

    def run(self, script, *args, seconds=None, cwd=None, **env):
        "Start the file `script`, and wait for it"
        self.start(script, *args, cwd=cwd, **env)
        return self.wait(seconds)

    def code(self, code, *args, **kw):
        "Run this program text"
        script = self.tmp/'program.py'
        script.write_text(code)
        return self.run(script, *args, **kw)

    def close(self):
        self.process.stdin.close()
        self.process.wait()

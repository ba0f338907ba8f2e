# usage: load.py URI...
# A client of each URI that does a bit of everything, and one that is none, until it is
# killed. The URIs are of a Unix socket.
import math, random, socket, sys, threading, time
import nbd

def client(uri, seed):
    rnd = random.Random(seed)
    h = nbd.NBD()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_uri(uri)
    size = h.get_size()
    while True:
        n = rnd.choice([4096, 4096, 4096, 65536, 262144])
        offset = rnd.randrange(0, size - n, 512)
        try:
            what = rnd.random()
            if what < 0.6:
                h.pread(n, offset)
            elif what < 0.85:
                h.pwrite(bytes(n), offset)
            elif what < 0.90:
                h.zero(n, offset)
            elif what < 0.95:
                h.trim(n, offset)
            elif what < 0.98:
                h.block_status(n, offset, lambda *a: 0)
            else:
                h.flush()
        except nbd.Error:
            pass
        if rnd.random() < 0.2:
            # Busier and calmer by turns.
            time.sleep(0.002 * (1.2 + math.sin(time.time() / 9 + seed)))

def stranger(path):
    """Comes and goes, or sends what is no NBD."""
    while True:
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(path)
            if random.random() < 0.5:
                s.recv(18)
                s.send(b"GET / HTTP/1.1\r\n\r\n" * 9)
        time.sleep(random.random())

threading.Thread(target=stranger, args=(sys.argv[1].partition("socket=")[2],)).start()
for seed, uri in enumerate(sys.argv[1:]):
    threading.Thread(target=client, args=(uri, seed)).start()

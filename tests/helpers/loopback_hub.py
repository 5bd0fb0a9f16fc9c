"""A Hub on this machine, of the standard library, that the real huggingface_hub client takes for the real one.

Repositories of models and data sets live in memory. A test lists what should go wrong in `faults`; `log` has every
request, `received` every body.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


class LoopbackHub:
    """A context in which the Hub answers at `url`.

    tokens: token -> (user, role). repositories: name -> {"refs", "commits", "private", "gated", "owner"}.
    faults: [method, pattern of the path, status, how often]. log: (method, path, status, token). received: bodies.
    """

    def __init__(self):
        self.tokens = {}
        self.repositories = {}
        self.lfs = {}
        self.faults = []
        self.log = []
        self.received = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def create(self, name, *, private=True, gated=False, files=None):
        self.repositories[name] = dict(refs={}, commits={}, private=private, gated=gated)
        operations = [
            ("file", dict(path=path, content=base64.b64encode(content).decode()))
            for path, content in {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}.items()
        ]
        self.commit(name, "main", operations, "initial commit")

    def commit(self, name, branch, operations, message):
        repository = self.repositories[name]
        with self.lock:
            parent = repository["refs"].get(branch)
            tree = dict(repository["commits"][parent]["tree"]) if parent else {}
            for key, value in operations:
                path = value["path"]
                if key == "file":
                    data = base64.b64decode(value["content"])
                    tree[path] = dict(data=data, oid=git_sha1(data), lfs=None)
                elif key == "lfsFile":
                    data = self.lfs[value["oid"]]
                    tree[path] = dict(data=data, oid=git_sha1(value["oid"].encode()), lfs=value["oid"])
                elif key == "deletedFile":
                    tree.pop(path, None)
            seed = f"{name}{branch}{len(repository['commits'])}{message}"
            commit = hashlib.sha1(seed.encode()).hexdigest()
            repository["commits"][commit] = dict(tree=tree, message=message)
            repository["refs"][branch] = commit
            return commit

    def resolve(self, name, revision):
        repository = self.repositories[name]
        return repository["refs"].get(revision) or (revision if revision in repository["commits"] else None)

    def files(self, name, revision="main"):
        """The files of a repository: name -> bytes."""
        tree = self.repositories[name]["commits"][self.resolve(name, revision)]["tree"]
        return {path: entry["data"] for path, entry in tree.items()}

    def messages(self, name):
        return [commit["message"] for commit in self.repositories[name]["commits"].values()]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def reply(self, status, value=None, headers=None, raw=None):
        data = raw if raw is not None else json.dumps({} if value is None else value).encode()
        self.server.hub.log.append((self.command, self.path, status, self.token))
        self.send_response(status)
        kind = "application/json" if raw is None else "application/octet-stream"
        for key, text in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status, code, message=""):
        message = message or code
        self.reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def answer(self):
        hub = self.server.hub
        url = urlsplit(self.path)
        body = self.body() if self.command == "POST" or self.command == "PUT" else b""
        hub.received.append(body)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        for fault in hub.faults:
            method, pattern, status, times = fault
            if times and self.command == method and re.search(pattern, self.path):
                fault[3] -= 1
                return self.fail(status, "Fault", f"fault with token {self.token}")
        if url.path == "/":
            return self.reply(200)
        if url.path.startswith("/lfs/"):
            return self.lfs_object(url.path.removeprefix("/lfs/"), body)
        user, role = hub.tokens.get(self.token, (None, None))
        if self.token and user is None:
            return self.fail(401, "Unauthorized", "Invalid credentials in Authorization header")
        if url.path == "/api/whoami-v2":
            access = dict(displayName="test", role=role)
            return self.reply(200, dict(type="user", name=user, orgs=[], auth=dict(accessToken=access)))
        if url.path == "/api/validate-yaml":
            if b"license: nonsense" not in body:
                return self.reply(200, dict(errors=[], warnings=[]))
            return self.reply(400, dict(errors=[dict(message='"license" must be one of [mit, ...]')], warnings=[]))
        if url.path == "/api/repos/create":
            return self.create(user, json.loads(body))
        for pattern, method in (
            (r"/([^/]+/[^/]+?)\.git/info/lfs/objects/batch", self.lfs_batch),
            (r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(preupload|commit|revision|branch)/([^/]+))?", self.api),
            (r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", self.tree),
            (r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.download),
        ):
            match = re.fullmatch(pattern, url.path)
            if match:
                repo_id, *rest = (unquote(group) if group else group for group in match.groups())
                return self.on_repository(user, repo_id, method, rest, body)
        return self.fail(404, "NotFound", f"no route {self.command} {self.path}")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def create(self, user, wanted):
        hub = self.server.hub
        owner = wanted.get("organization") or user
        name = f"{owner}/{wanted['name']}"
        address = dict(url=f"{hub.url}/{name}", name=name, id=name)
        if owner != user:
            return self.fail(403, "Forbidden", f"You don't have the rights to create a model under {owner}")
        if name in hub.repositories:
            return self.reply(409, address, {"X-Error-Message": "You already created this model repo"})
        hub.create(name, private=wanted.get("visibility") == "private")
        return self.reply(200, address)

    def on_repository(self, user, repo_id, method, rest, body):
        hub = self.server.hub
        repository = hub.repositories.get(repo_id)
        mine = user == repo_id.split("/")[0]
        if repository is None or (repository["private"] and not mine):
            return self.fail(404 if user else 401, "RepoNotFound", "Repository not found")
        if repository["gated"] and not mine and "/resolve/" in self.path:
            return self.fail(403, "GatedRepo", "Access to this model is restricted")
        if self.command == "POST" and not mine:
            return self.fail(403, "Forbidden", "pass `create_pr=1` as a query parameter to create a Pull Request")
        return method(repo_id, *rest, body)

    def lfs_batch(self, repo_id, body):
        hub, objects = self.server.hub, []
        for item in json.loads(body)["objects"]:
            entry = dict(oid=item["oid"], size=item["size"])
            if item["oid"] not in hub.lfs:
                place = f"{hub.url}/lfs/{item['oid']}"
                entry["actions"] = dict(upload=dict(href=place, header={}), verify=dict(href=place))
            objects.append(entry)
        answer = dict(transfer="basic", objects=objects)
        self.reply(200, answer, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_object(self, oid, body):
        if self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == oid
            self.server.hub.lfs[oid] = body
        self.reply(200 if oid in self.server.hub.lfs else 404)

    def api(self, repo_id, verb, revision, body):
        hub = self.server.hub
        repository, revision = hub.repositories[repo_id], revision or "main"
        if verb == "branch":
            if revision in repository["refs"]:
                return self.fail(409, "Conflict", "Reference already exists")
            repository["refs"][revision] = hub.resolve(repo_id, "main")
            return self.reply(200)
        commit = hub.resolve(repo_id, revision)
        if commit is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        tree = repository["commits"][commit]["tree"]
        if verb == "preupload":
            files = []
            for file in json.loads(body)["files"]:
                old = tree.get(file["path"])
                mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
                oid = (old["lfs"] or old["oid"]) if old else None
                files.append(dict(path=file["path"], uploadMode=mode, shouldIgnore=False, oid=oid))
            return self.reply(200, dict(files=files, commitOid=commit))
        if verb == "commit":
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
            operations = [(line["key"], line["value"]) for line in lines if line["key"] != "header"]
            commit = hub.commit(repo_id, revision, operations, message)
            place = f"{hub.url}/{repo_id}/commit/{commit}"
            return self.reply(200, dict(success=True, commitOid=commit, commitUrl=place, hookOutput=""))
        card = front_matter(tree["README.md"]["data"].decode()) if "README.md" in tree else {}
        info = dict(
            _id="0" * 24,
            id=repo_id,
            modelId=repo_id,
            sha=commit,
            private=repository["private"],
            gated="auto" if repository["gated"] else False,
            tags=card.get("tags", []),
            cardData=card,
            siblings=[dict(rfilename=path) for path in tree],
        )
        if "model-index" in card:
            info["model-index"] = card["model-index"]
        return self.reply(200, info)

    def tree(self, repo_id, revision, folder, body):
        """List what lies directly in a folder, or with `recursive` all files below it."""
        hub, recursive = self.server.hub, "recursive=true" in self.path.lower()
        entries, start = {}, f"{folder}/" if folder else ""
        for path, entry in hub.repositories[repo_id]["commits"][hub.resolve(repo_id, revision)]["tree"].items():
            if path.startswith(start):
                name, inner, _ = path.removeprefix(start).partition("\0" if recursive else "/")
                facts = dict(type="directory", size=0) if inner else dict(type="file", size=len(entry["data"]))
                entries[start + name] = dict(path=start + name, oid=entry["oid"], **facts)
        return self.reply(200, list(entries.values())) if entries else self.fail(404, "EntryNotFound")

    def download(self, repo_id, revision, path, body):
        hub = self.server.hub
        commit = hub.resolve(repo_id, revision)
        if commit is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        entry = hub.repositories[repo_id]["commits"][commit]["tree"].get(path)
        if entry is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit}
            return self.reply(404, {"error": "Entry not found"}, headers)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["lfs"] or entry["oid"]}"'}
        if entry["lfs"]:
            headers |= {"X-Linked-Size": str(len(entry["data"])), "X-Linked-Etag": f'"{entry["lfs"]}"'}
        return self.reply(200, raw=entry["data"], headers=headers)


def git_sha1(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def front_matter(text):
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return (yaml.safe_load(match[1]) or {}) if match else {}

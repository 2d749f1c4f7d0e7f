package main

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A proxy is a real one that serves a site as deploy/ says, until the test
// ends. Its files are in root; wxscan and the site's backend are addresses.
type proxy func(t *testing.T, address, wxscan, backend, root string)

func nginx(t *testing.T, address, wxscan, backend, root string) {
	t.Helper()
	serveNginx(t, address, root, shipped(t, "nginx.conf", "listen 80;", "listen "+address+";",
		"127.0.0.1:8080; }", wxscan+"; }", "127.0.0.1:3000;", backend+";", "/var/www/site", root))
}

// plainNginx passes everything on to wxscan, as the shortest of tutorials do.
func plainNginx(t *testing.T, address, wxscan, _, root string) {
	t.Helper()
	site := fmt.Appendf(nil, "server { listen %s; location / { proxy_pass http://%s; } }", address, wxscan)
	serveNginx(t, address, root, site)
}

// serveNginx serves a site, with an access log in root.
func serveNginx(t *testing.T, address, root string, site []byte) {
	t.Helper()
	program := program(t, "nginx", "nginx-light")
	me, err := user.Current()
	must(t, err)
	folder := t.TempDir()
	must(t, os.WriteFile(filepath.Join(folder, "site.conf"), site, 0o600))
	config := fmt.Appendf(nil, "user %s; pid nginx.pid; events {} http { access_log %s/access.log; include site.conf; "+
		"client_body_temp_path a; proxy_temp_path b; fastcgi_temp_path c; uwsgi_temp_path d; scgi_temp_path e; }",
		me.Username, root)
	must(t, os.WriteFile(filepath.Join(folder, "nginx.conf"), config, 0o600))
	serveUntilEnd(t, address, exec.CommandContext(t.Context(), program,
		"-e", "stderr", "-p", folder, "-c", "nginx.conf", "-g", "daemon off;"))
}

func caddy(t *testing.T, address, wxscan, backend, root string) {
	t.Helper()
	program := program(t, "caddy", "caddy")
	folder := t.TempDir()
	file := filepath.Join(folder, "Caddyfile")
	host, port, err := net.SplitHostPort(address)
	must(t, err)
	site := shipped(t, "Caddyfile", "\nwww.example.com {", "\n:"+port+" {", "127.0.0.1:8080\n", wxscan+"\n",
		"127.0.0.1:8080 {", wxscan+" {", "127.0.0.1:3000", backend, "/var/www/site", root)
	options := []byte("{\n\tadmin off\n\tdefault_bind " + host + "\n}\n")
	must(t, os.WriteFile(file, append(options, site...), 0o600))
	cmd := exec.CommandContext(t.Context(), program, "run", "--config", file, "--adapter", "caddyfile")
	cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+folder, "XDG_DATA_HOME="+folder)
	serveUntilEnd(t, address, cmd)
}

// shipped returns a file of deploy/ with each old replaced by the new after it.
func shipped(t *testing.T, name string, oldnew ...string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("deploy", name))
	must(t, err)
	for i := 0; i < len(oldnew); i += 2 {
		if !strings.Contains(string(data), oldnew[i]) {
			t.Fatalf("deploy/%s has no %q", name, oldnew[i])
		}
	}
	return []byte(strings.NewReplacer(oldnew...).Replace(string(data)))
}

// serveUntilEnd starts a server, waits until it listens, and ends it with the test.
func serveUntilEnd(t *testing.T, address string, cmd *exec.Cmd) {
	t.Helper()
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = t.Output(), t.Output(), 5*time.Second
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	must(t, cmd.Start())
	t.Cleanup(func() { cmd.Wait() })
	eventually(t, cmd.String()+" listens", func() bool { return listens(address) })
}

func listens(address string) bool {
	conn, err := net.Dial("tcp", address)
	if err == nil {
		conn.Close()
	}
	return err == nil
}

var lastPort atomic.Int32 // that freeAddress has given

// freeAddress returns a loopback address whose port is free, and stays so while a
// server is stopped and started: it is below those that outgoing connections get.
func freeAddress(t *testing.T) string {
	t.Helper()
	lastPort.CompareAndSwap(0, 20000+rand.Int32N(10000))
	for range 1000 {
		address := fmt.Sprint("127.0.0.1:", lastPort.Add(1))
		if listener, err := net.Listen("tcp", address); err == nil {
			listener.Close()
			return address
		}
	}
	t.Fatal("no port is free")
	return ""
}

// An echo is a request as a backend got it.
type echo struct {
	Method, URI, Host string
	Header            http.Header
	Length            int64 // of the body
}

// echoes answers with the request. It switches to whatever protocol it is asked for;
// as a WebSocket, it sends a line back.
func echoes(w http.ResponseWriter, r *http.Request) {
	if protocol := r.Header.Get("Upgrade"); protocol != "" {
		conn, lines, _ := http.NewResponseController(w).Hijack()
		defer conn.Close()
		fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n"+
			"X-Who: %s\r\n\r\n", protocol, r.Header.Get("X-WeChat-OpenID"))
		if strings.EqualFold(protocol, "websocket") {
			line, _ := lines.ReadString('\n')
			fmt.Fprint(conn, line)
		}
		return
	}
	length, _ := io.Copy(io.Discard, r.Body)
	json.NewEncoder(w).Encode(echo{r.Method, r.RequestURI, r.Host, r.Header, length})
}

// saying returns the values of a header, joined, by whatever spelling of its
// name: CGI, and what descends from it, takes - and _ for the same.
func (e echo) saying(name string) string {
	var values []string
	for got, v := range e.Header {
		if strings.EqualFold(strings.NewReplacer("_", "-", ".", "-").Replace(got), name) {
			values = append(values, v...)
		}
	}
	return strings.Join(values, "|")
}

// A visitor is a browser's cookie jar before a site that takes a login. It
// follows no redirect.
type visitor struct {
	http.Client
	t      *testing.T
	site   string       // its URL
	visits atomic.Int64 // of the site's backend
	log    string       // nginx's access log
}

// visit returns a visitor of a site behind a proxy and wxscan, which is -demo if no
// other address is given. /reports/ is a backend that echoes, the rest a file.
func visit(t *testing.T, serve proxy, address, wxscan string) *visitor {
	t.Helper()
	if wxscan == "" {
		wxscan, _, _ = start(t, none, "-demo", "-addr", "127.0.0.1:0",
			"-url", "http://"+address, "-verify-file", "MP_verify_abc.txt")
	}
	jar, err := cookiejar.New(nil)
	must(t, err)
	v := &visitor{t: t, site: "http://" + address}
	v.Jar, v.CheckRedirect, v.Timeout = jar, noRedirect, 20*time.Second
	backend := newLocalServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v.visits.Add(1)
		echoes(w, r)
	}))
	root := t.TempDir()
	must(t, os.Chmod(root, 0o755))
	must(t, os.WriteFile(filepath.Join(root, "index.html"), []byte("for members only"), 0o644))
	v.log = filepath.Join(root, "access.log")
	serve(t, address, strings.TrimPrefix(wxscan, "http://"), strings.TrimPrefix(backend, "http://"), root)
	return v
}

func (v *visitor) send(method, path, body string, headers ...string) response {
	return send(&v.Client, method, v.site+path, body, headers...)
}

// wants complains unless a request is answered with a status.
func (v *visitor) wants(status int, method, path string, headers ...string) response {
	v.t.Helper()
	resp := v.send(method, path, "", headers...)
	if resp.StatusCode != status {
		v.t.Errorf("%s %s %q: %s %.200q, want %d", method, path, headers, resp.Status, resp.body, status)
	}
	return resp
}

// logIn logs alice in by the flow that getloginqr or getauthqr begins, while a poll
// is parked.
func (v *visitor) logIn(begin string) {
	v.t.Helper()
	var qr qrAnswer
	getJSON(v.t, &v.Client, v.site+"/wechat/"+begin, &qr)
	go func() {
		time.Sleep(50 * time.Millisecond)
		scanned(v.t, v.site, qr.Ticket, "alice")
	}()
	begun := time.Now()
	poll := v.wants(200, "GET", "/wechat/checklogin?wait=20&ticket="+qr.Ticket)
	if took := time.Since(begun); !strings.Contains(poll.body, `"openid":"alice"`) || took > 5*time.Second {
		v.t.Fatalf("%s: %s after %v", begin, poll.body, took)
	}
}

// echoed returns what the backend got of a request that must reach it.
func (v *visitor) echoed(method, path, body string, headers ...string) (e echo) {
	v.t.Helper()
	resp := v.send(method, path, body, headers...)
	if err := json.Unmarshal([]byte(resp.body), &e); err != nil || resp.StatusCode != http.StatusOK {
		v.t.Fatalf("%s %s: %s %.200q, want what the backend got", method, path, resp.Status, resp.body)
	}
	return e
}

// TestSiteBehindAProxy visits one site at each of the proxies that deploy/ is for. All
// but the first find alice logged in.
func TestSiteBehindAProxy(t *testing.T) {
	for name, serve := range map[string]proxy{"nginx": nginx, "caddy": caddy} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := visit(t, serve, freeAddress(t), "")
			for _, test := range []struct {
				sentence string
				test     func(*testing.T, *visitor)
			}{
				{"leads through the login to the page asked for", leadsToThePageAskedFor},
				{"lets nobody past without a login", letsNobodyPast},
				{"tells the backend who it is, whatever the client says", tellsTheBackendWhoItIs},
				{"takes larger bodies than wxscan does", takesLargeBodies},
				{"lets WebSockets through, and no other tunnel", letsWebSocketsThrough},
			} {
				t.Run(test.sentence, func(t *testing.T) { v.t = t; test.test(t, v) })
			}
			if name == "nginx" {
				eventually(t, "it logs", func() bool { return strings.Contains(content(t, v.log), "GET /reports/7") })
				secret := regexp.MustCompile(`.*[?&](ticket|code|signature|s)=.*`)
				equal(t, "secrets in its access log", secret.FindString(content(t, v.log)), "")
			}
			t.Run("tells wxscan who asks", func(t *testing.T) { tellsWxscanWhoAsks(t, serve) })
			t.Run("lets nobody in while wxscan is down", func(t *testing.T) {
				v := visit(t, serve, freeAddress(t), freeAddress(t))
				for _, path := range []string{"/", "/reports/7"} {
					resp := v.send("GET", path, "")
					if resp.StatusCode < 500 || strings.Contains(resp.body, "members") || v.visits.Load() > 0 {
						t.Errorf("%s: %s %q, want 5xx", path, resp.Status, resp.body)
					}
				}
			})
		})
	}
}

func leadsToThePageAskedFor(t *testing.T, v *visitor) {
	for path, begin := range map[string]string{
		"/reports/a%20b?c=d+e&&f=%2541%26g?h&return_to=/elsewhere":       "getloginqr",
		"/reports/wechat/static/html/login":                              "getauthqr",
		"/reports/%E6%8A%A5%E5%91%8A/100%25?url=https%3A%2F%2Fa.example": "getauthqr",
	} {
		v.wants(204, "POST", "/wechat/logout", "Origin", v.site)
		to := v.wants(302, "GET", path).Header.Get("Location")
		equal(t, "who is not logged in is sent to", to, "/login?return_to="+path)
		page, want := v.wants(200, "GET", to).body, `data-return-to="`+html.EscapeString(path)+`"`
		if !strings.Contains(page, want) {
			t.Errorf("the login page has no %s:\n%s", want, page)
		}
		v.logIn(begin)
		if e := v.echoed("GET", path, ""); e.URI != path || e.saying("X-WeChat-OpenID") != "alice" {
			t.Errorf("the backend got %+v", e)
		}
		equal(t, "the file", v.wants(200, "GET", "/").body, "for members only")
	}
	for path, want := range map[string]int{"/static/wxscan.js": 200, "/static/html/loginfailed.html?reason=x": 200,
		"/MP_verify_abc.txt": 200, "/wechat/session": 200, "/wechat/message?signature=x": 403, "/demo/nothing": 404,
		"/wechat/qr.png?ticket=x": 404, "/wechat/accessusercode?code=x": 303, "/wechat/confirm?s=x": 303,
		"/.wxscan": 404} {
		v.wants(want, "GET", path)
	}
}

func letsNobodyPast(t *testing.T, v *visitor) {
	where, err := url.Parse(v.site)
	must(t, err)
	jar := v.Jar
	cookie := jar.Cookies(where)[0]
	v.Jar = nil
	defer func() { v.Jar = jar }()
	other := testSigner(strings.Repeat("s", 32))
	other.issuer, other.audience = v.site, "wx0123456789abcdef"
	forged, err := other.sign(login{OpenID: "alice"}, time.Now(), "id")
	must(t, err)
	before := v.visits.Load()
	for _, path := range []string{"/reports/7", "/", "/index.html", "/static/site.css", "/MP_verify_abc.txt.html"} {
		for _, method := range []string{"GET", "HEAD", "POST", "OPTIONS"} {
			v.wants(302, method, path)
		}
		for _, token := range []string{"", cookie.Value[:len(cookie.Value)-1], forged} {
			v.wants(302, "GET", path, "Cookie", cookie.Name+"="+token)
			v.wants(302, "GET", path, "Authorization", "Bearer "+token)
		}
	}
	for _, path := range []string{
		"//reports/7", "/./reports/7", "/x/../reports/7", "/%72eports/7", "/wechat/../reports/7",
		"/index.html?/wechat/", "/wechat/..%2freports/7", "/demo/..//reports/7", "/static/html/../../index.html",
		"/wechat/%2e%2e/reports/7",
		"/login/../index.html", "/login%2f..%2findex.html", "/MP_verify_abc.txt/../index.html",
		"/wechat/..;/index.html", "/.wxscan", "/.wxscan/../reports/7", "/wechat/session/../../reports/7",
		"/reports/7%00/wechat/", "/reports/7%3f/login",
	} {
		resp := v.send("GET", path, "")
		if resp.StatusCode == http.StatusOK || resp.StatusCode == 0 || strings.Contains(resp.body, "members") {
			t.Errorf("%s: %s %q", path, resp.Status, resp.body)
		}
	}
	equal(t, "requests at the backend", v.visits.Load(), before)
	e := v.echoed("GET", "/reports/7", "", "Authorization", "Bearer "+cookie.Value)
	equal(t, "with the right token the backend is told", e.saying("X-WeChat-OpenID"), "alice")
}

func tellsTheBackendWhoItIs(t *testing.T, v *visitor) {
	for _, name := range []string{
		"X-WeChat-OpenID", "x-wechat-openid", "X_WeChat_OpenID", "X-WeChat_OpenID", "X.WeChat.OpenID",
		"X-WeChat-UnionID", "X_WeChat_UnionID", "x-wechat_unionid", "Connection",
	} {
		headers := []string{name, "mallory", name, "eve"}
		if name == "Connection" { // whose own headers a proxy leaves out
			headers = []string{name, "keep-alive, x-wechat-openid"}
		}
		e := v.echoed("GET", "/reports/7", "", headers...)
		equal(t, name, e.saying("X-WeChat-OpenID")+" "+e.saying("X-WeChat-UnionID"), "alice ")
	}
}

func takesLargeBodies(t *testing.T, v *visitor) {
	for _, length := range []int64{2 * maxBody, -1} { // the client may not know it
		body := io.NopCloser(strings.NewReader(strings.Repeat("x", 2*maxBody)))
		req, err := http.NewRequest("POST", v.site+"/reports/", body)
		must(t, err)
		req.ContentLength = length
		resp, err := v.Do(req)
		must(t, err)
		var e echo
		must(t, json.NewDecoder(resp.Body).Decode(&e))
		resp.Body.Close()
		equal(t, "the backend got", fmt.Sprint(e.Method, e.Length), fmt.Sprint("POST", 2*maxBody))
	}
	v.wants(200, "HEAD", "/reports/7")
}

func letsWebSocketsThrough(t *testing.T, v *visitor) {
	for _, protocol := range []string{"h2c", "tls/1.2", "websocket, h2c"} {
		v.wants(200, "GET", "/reports/", "Connection", "Upgrade", "Upgrade", protocol)
	}
	where, err := url.Parse(v.site)
	must(t, err)
	for cookie, want := range map[string]int{"": 302, v.Jar.Cookies(where)[0].String(): 101} {
		conn, err := net.Dial("tcp", where.Host)
		must(t, err)
		defer conn.Close()
		fmt.Fprintf(conn, "GET /reports/ HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n"+
			"Cookie: %s\r\n\r\n", where.Host, cookie)
		in := bufio.NewReader(conn)
		resp, err := http.ReadResponse(in, nil)
		must(t, err)
		if equal(t, cookie, resp.StatusCode, want); want == 101 {
			fmt.Fprint(conn, "hello\n")
			got, err := in.ReadString('\n')
			equal(t, "through the tunnel comes", resp.Header.Get("X-Who")+" "+got+fmt.Sprint(err), "alice hello\n<nil>")
		}
	}
}

// tellsWxscanWhoAsks has a backend stand for wxscan.
func tellsWxscanWhoAsks(t *testing.T, serve proxy) {
	wxscan := newLocalServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-WeChat-OpenID", "alice")
		w.Header().Set("X-WeChat-UnionID", "union")
		if r.URL.Path == "/wechat/session" && (r.Method != "GET" || r.ContentLength != 0) {
			t.Errorf("wxscan gets a %s with a body of %d bytes", r.Method, r.ContentLength)
		}
		echoes(w, r)
	}))
	v := visit(t, serve, freeAddress(t), wxscan)
	for _, path := range []string{"/wechat/getauthqr", "/login", "/reports/7"} {
		e := v.echoed("GET", path, "", "X-Forwarded-For", "203.0.113.9")
		equal(t, path, e.saying("X-Forwarded-For")+" http://"+e.Host, "127.0.0.1 "+v.site)
	}
	e := v.echoed("GET", "/login?return_to=/a?b=c&d=%2541", "")
	equal(t, "the login page is asked for by", e.URI, "/?return_to=/a?b=c&d=%2541")
	e = v.echoed("POST", "/reports/7", "body")
	equal(t, "the backend is told the union id", e.saying("X-WeChat-UnionID"), "union")
}

func TestAProxyThatDoesNotSayWhoAsksIsNoticed(t *testing.T) {
	address := freeAddress(t)
	settings := only("METRICS_TOKEN=letmein", "QR_RATE=2")
	wxscan, _, _ := start(t, settings, "-demo", "-addr", "127.0.0.1:0", "-url", "http://"+address)
	checked := func(site string) string {
		var said strings.Builder
		args := []string{"check", "-demo", "-addr", strings.TrimPrefix(wxscan, "http://"), "-url", site}
		run(t.Context(), args, none, &said, io.Discard)
		return said.String()
	}
	v := visit(t, plainNginx, address, wxscan)
	said, want := checked(v.site), "✗ "+v.site+" answers, but the proxy in front of it does not say who asks"
	if !strings.Contains(said, want) {
		t.Errorf("check says %s", said)
	}
	v.wants(404, "GET", "/metrics")
	for range 20 { // ten times QR_RATE
		v.wants(200, "GET", "/wechat/getauthqr")
	}
	v.wants(429, "GET", "/wechat/getauthqr")
	v = visit(t, nginx, freeAddress(t), wxscan)
	said, want = checked(v.site), "✓ "+v.site+" answers WeChat's check of the interface URL\n"
	if !strings.Contains(said, want) {
		t.Errorf("behind a proxy that says so, check says %s", said)
	}
}

func TestBrowserArrivesAtThePageItAskedFor(t *testing.T) {
	program(t, "nginx", "nginx-light")
	address := freeAddress(t)
	b := browse(t, "-url", "http://"+address)
	b.base = visit(t, nginx, address, b.base).site
	b.open("/reports/7?a=1&b=2")
	b.wait(pageStatus, prompt)
	b.is("location.pathname + location.search", "/login?return_to=/reports/7?a=1&b=2")
	b.quiet("the login page")
	b.scan("alice")
	b.wait("location.pathname + location.search", "/reports/7?a=1&b=2")
	b.wait("document.body.innerText.includes('\"X-Wechat-Openid\":[\"alice\"]')", "true")
}

// TestNginxServesHTTPSAsItsCommentSays follows the comment at the end of nginx.conf.
func TestNginxServesHTTPSAsItsCommentSays(t *testing.T) {
	folder, plain, secure := t.TempDir(), freeAddress(t), freeAddress(t)
	certFile, keyFile := certificate(t)
	options := filepath.Join(folder, "options")
	must(t, os.WriteFile(options, nil, 0o600))
	site, comment, _ := strings.Cut(content(t, "deploy/nginx.conf"), "\n# For https: ")
	_, comment, _ = strings.Cut(comment, "\n#\t")
	lines := strings.Split(strings.ReplaceAll("#\t"+comment, "\n#", "\n")[1:], "\n")
	if len(lines) < 7 || !strings.HasPrefix(lines[6], "server {") {
		t.Fatalf("not six lines, then a server: %q", lines)
	}
	site = strings.Replace(site, "listen 80;", strings.Join(lines[:6], "\n"), 1) + "\n" + strings.Join(lines[6:], "\n")
	backend := newLocalServer(t, http.HandlerFunc(echoes))
	serveNginx(t, secure, folder, []byte(strings.NewReplacer("listen 80;", "listen "+plain+";",
		"listen 443 ", "listen "+secure+" ", "ssl_dhparam", "# ssl_dhparam",
		"127.0.0.1:8080; }", strings.TrimPrefix(backend, "http://")+"; }",
		"/etc/letsencrypt/options-ssl-nginx.conf", options,
		"/etc/letsencrypt/live/www.example.com/fullchain.pem", certFile,
		"/etc/letsencrypt/live/www.example.com/privkey.pem", keyFile).Replace(site)))
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
	v := &visitor{t: t, site: "https://" + secure, Client: http.Client{Transport: transport, CheckRedirect: noRedirect}}
	if resp := v.send("GET", "/login", ""); resp.ProtoMajor != 2 || resp.Header.Get("Strict-Transport-Security") == "" {
		t.Errorf("%s, %v", resp.Proto, resp.Header)
	}
	if e := v.echoed("GET", "/login", ""); e.Host != secure || e.saying("X-Forwarded-Proto") != "https" {
		t.Errorf("wxscan got %+v", e)
	}
	v.site = "http://" + plain
	to := v.wants(301, "GET", "/a?b=c").Header.Get("Location")
	equal(t, "over http one is sent to", to, "https://127.0.0.1/a?b=c")
}

package main

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Not those of -demo, so that they can be told from mere words.
const testSecret, testToken = "appsecretAPPSECRET", "tokenTOKENtokenT"

// A world is a server and the simulated WeChat that it talks to, without
// sockets, so that it can live in a synctest bubble.
type world struct {
	*server
	handler http.Handler
	logged  *syncBuffer
	// fault, if set, sees a call of WeChat's API first. It is true if it answered.
	fault func(w http.ResponseWriter, r *http.Request) bool

	mu    sync.Mutex     // guards fault, calls, issued
	calls map[string]int // calls of WeChat's API, by path

	answers, begun *syncBuffer // what was answered, and that to getloginqr and getauthqr
	issued         []string    // tickets
}

// syncBuffer is a log that may be written and read at once.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// newWorld returns a world with the settings of -demo and the given ones, each
// NAME=value. Its tickets are in the Redis of WXSCAN_REDIS, if that is set.
func newWorld(t testing.TB, settings ...string) *world {
	t.Helper()
	config, err := parseConfig([]string{"-demo"}, only(append(settings, "WECHAT_TOKEN="+testToken)...))
	must(t, err)
	config.simulate(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 80})
	w := &world{logged: new(syncBuffer), answers: new(syncBuffer), begun: new(syncBuffer), calls: make(map[string]int)}
	config.appSecret = testSecret
	log := newLog(io.MultiWriter(w.logged, t.Output()), slog.LevelDebug, "text")
	if url := os.Getenv("WXSCAN_REDIS"); url != "" {
		config.redisURL, err = parseRedisURL(url)
		must(t, err)
		config.redisPrefix = rand.Text() + ":"
	}
	w.server = newServer(config, log)
	w.wechat.client.Transport = w
	simulator := newDemo(config, w.wechat.client, w.tickets)
	t.Cleanup(func() { w.checkLeaks(t, simulator) })
	w.demo = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		path := strings.TrimPrefix(r.URL.Path, "/demo")
		w.mu.Lock()
		w.calls[path]++
		fault := w.fault
		w.mu.Unlock()
		isAPI := strings.HasPrefix(path, "/cgi-bin/") || strings.HasPrefix(path, "/sns/")
		if fault == nil || !isAPI || !fault(rw, r) {
			simulator.ServeHTTP(rw, r)
		}
	})
	w.handler = w.record(w.routes())
	if w.redis == nil {
		go w.work(t.Context())
	} else { // without work: time stands still in a bubble while somebody listens to a real Redis
		t.Cleanup(w.redis.hangUp)
	}
	return w
}

// record keeps what h answers, besides the simulator's answers.
func (w *world) record(h http.Handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/demo/") {
			h.ServeHTTP(rw, r)
			return
		}
		out, kept := httptest.NewRecorder(), w.answers
		if strings.HasPrefix(r.URL.Path, "/wechat/get") {
			kept = w.begun // the one place where tickets are told
		}
		h.ServeHTTP(out, r)
		fmt.Fprintln(kept, out.Header(), out.Body)
		maps.Copy(rw.Header(), out.Header())
		rw.WriteHeader(out.Code)
		rw.Write(out.Body.Bytes())
	})
}

// checkLeaks fails the test if a secret of this world is in its log, or in an
// answer where it has no business.
func (w *world) checkLeaks(t testing.TB, simulator *demo) {
	logged, answers, begun := w.logged.String(), w.answers.String(), w.begun.String()
	secrets := []string{w.config.appSecret, w.config.token, docKey}
	simulator.mu.Lock()
	defer simulator.mu.Unlock()
	for name, g := range simulator.grants {
		switch g.kind {
		case "token", "user", "code", "used":
			secrets = append(secrets, name)
		case "ticket": // WeChat's: no secret, but random enough to hold a short Token
			begun = strings.ReplaceAll(begun, url.QueryEscape(name), "")
		}
	}
	if strings.Contains(logged, `hint=""`) {
		t.Error("a log line has an empty hint")
	}
	leaks := func(secret, text string) {
		if strings.Contains(text, secret) || strings.Contains(text, url.QueryEscape(secret)) {
			t.Errorf("the secret %q is in the log or in an answer", secret)
		}
	}
	for _, secret := range secrets {
		leaks(secret, logged+answers+begun)
	}
	for _, ticket := range w.issued {
		leaks(ticket, logged+answers)
	}
}

func (w *world) setFault(fault func(http.ResponseWriter, *http.Request) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fault = fault
}

func (w *world) called(path string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.calls[path]
}

// RoundTrip makes a world the transport of its own clients.
func (w *world) RoundTrip(r *http.Request) (*http.Response, error) {
	in := r.Clone(r.Context())
	in.RequestURI, in.RemoteAddr = r.URL.RequestURI(), "127.0.0.1:50000"
	if in.Body == nil {
		in.Body = http.NoBody
	}
	out, done := httptest.NewRecorder(), make(chan struct{})
	go func() {
		defer close(done)
		w.handler.ServeHTTP(out, in)
	}()
	select {
	case <-done:
		return out.Result(), nil
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
}

// do makes a request of the server. headers are names and values; those
// without a value are left out, and peer is no header, but who asks.
func (w *world) do(method, target, body string, headers ...string) *httptest.ResponseRecorder {
	r, out := httptest.NewRequest(method, target, strings.NewReader(body)), httptest.NewRecorder()
	for i := 0; i < len(headers); i += 2 {
		switch name, value := headers[i], headers[i+1]; {
		case name == "peer":
			r.RemoteAddr = value
		case value != "":
			r.Header.Set(name, value)
		}
	}
	w.handler.ServeHTTP(out, r)
	return out
}

// submit sends a form; fields are names and values.
func (w *world) submit(target string, fields ...string) *httptest.ResponseRecorder {
	form := make(url.Values)
	for i := 0; i < len(fields); i += 2 {
		form.Add(fields[i], fields[i+1])
	}
	return w.do("POST", target, form.Encode(), "Content-Type", "application/x-www-form-urlencoded")
}

// push sends an event as WeChat does.
func (w *world) push(event string) *httptest.ResponseRecorder {
	return w.do("POST", "/wechat/message?"+w.signed(), event)
}

// begin asks for a ticket: "getloginqr" or "getauthqr".
func (w *world) begin(t testing.TB, what string, headers ...string) (qr qrAnswer) {
	t.Helper()
	out := w.do("GET", "/wechat/"+what, "", headers...)
	if err := json.Unmarshal(out.Body.Bytes(), &qr); err != nil || out.Code != 200 || qr.Ticket == "" {
		t.Fatalf("%s: %d %s", what, out.Code, out.Body)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.issued = append(w.issued, qr.Ticket)
	return qr
}

func (w *world) check(t testing.TB, ticket, wait string) (answer pollAnswer) {
	t.Helper()
	out := w.do("GET", "/wechat/checklogin?ticket="+url.QueryEscape(ticket)+"&wait="+wait, "")
	must(t, json.Unmarshal(out.Body.Bytes(), &answer))
	if out.Code != 200 {
		t.Errorf("checklogin: status %d", out.Code)
	}
	return answer
}

// scan lets the simulated phone scan; it returns the status and what it shows.
func (w *world) scan(ticket, openID, event string) (int, string) {
	out := w.do("POST", "/demo/scan?"+url.Values{"ticket": {ticket}, "openid": {openID}, "event": {event}}.Encode(), "")
	return out.Code, strings.TrimSpace(out.Body.String())
}

// signed returns a signed query for /wechat/message.
func (w *world) signed() string { return w.signedAt(time.Now()) }

func (w *world) signedAt(at time.Time) string {
	timestamp, nonce := strconv.FormatInt(at.Unix(), 10), rand.Text()
	sum := signature(w.config.token, timestamp, nonce)
	return url.Values{"timestamp": {timestamp}, "nonce": {nonce}, "signature": {sum}}.Encode()
}

func pushXML(openID, eventName, key, ticket string) string {
	return fmt.Sprintf("<xml><ToUserName>gh_1</ToUserName><FromUserName>%s</FromUserName>"+
		"<CreateTime>1714036504</CreateTime><MsgType>event</MsgType><Event>%s</Event><EventKey>%s</EventKey>"+
		"<Ticket>%s</Ticket></xml>", openID, eventName, key, ticket)
}

func TestRoutes(t *testing.T) {
	const policy, pagePolicy = "default-src 'none'; frame-ancestors 'none'", "default-src 'none'; " +
		"script-src 'self'; style-src 'self'; connect-src 'self'; " +
		"img-src 'self' https://*.qlogo.cn http://127.0.0.1:80; " +
		"form-action 'self'; base-uri 'none'; frame-src 'self'; frame-ancestors 'self'"
	const nothing = `application/json {"error":"not_found","message":"there is nothing here, or no longer"}`
	const badMethod = ` application/json {"error":"method_not_allowed","message":"not with this method; Allow says`
	const message, poll, expired = "/wechat/message", "/wechat/checklogin", `{"login":false,"status":"expired"}`
	w := newWorld(t, "WECHAT_TOKEN="+docToken, "WECHAT_VERIFY_FILE=MP_verify_aB3xyz.txt")
	good := "?" + w.signed()
	bad := strings.Replace(good, "nonce=", "nonce=x", 1)
	most := "<xml></xml>" + strings.Repeat(" ", maxBody-len("<xml></xml>"))
	scan, auth := w.begin(t, "getloginqr"), w.begin(t, "getauthqr")
	mallory := pushXML("mallory", "SCAN", "s", scan.Ticket)
	ticket, photographed := "?ticket="+scan.Ticket, "?ticket="+digest(auth.Ticket).String()
	callback := "/wechat/accessusercode?state=" + digest(auth.Ticket).String() + "&code=" + w.code(t, "alice", "allow")
	for _, test := range []struct {
		name, method, target, body string
		status                     int
		want                       string // in Allow, the Content-Type and the body
	}{
		{"URL check of WeChat's documents", "GET", message + "?signature=" + docSignature +
			"&timestamp=1714036504&nonce=1514711492&echostr=4375", "", 200, "4375"},
		{"URL check answers the echostr raw", "GET", message + good + "&echostr=%3C437%26", "", 200, plainText + " <4"},
		{"URL check with a slash is no redirect", "GET", message + "/" + good + "&echostr=437", "", 200, "437"},
		{"URL check with a bad signature", "GET", message + bad + "&echostr=437", "", 403, "bad_signature"},
		{"unsigned push logs nobody in", "POST", message, mallory, 403, "bad_signature"},
		{"unsigned push that claims to be sealed logs nobody in", "POST", message + "?encrypt_type=aes&" +
			"msg_signature=x&nonce=n&timestamp=" + fmt.Sprint(time.Now().Unix()), mallory, 403, "bad_signature"},
		{"signature comes before size", "POST", message + bad, most + " ", 403, "bad_signature"},
		{"push over 64 KiB", "POST", message + good, most + " ", 413, "too_large"},
		{"push of 64 KiB", "POST", message + "?" + w.signed(), most, 200, "success"},
		{"push with another root", "POST", message + good, "<html></html>", 400, "bad_push"},
		{"push with a second root", "POST", message + good, "<xml></xml><xml></xml>", 400, "bad_push"},
		{"push with a trailing slash", "POST", message + "/" + good, "<xml></xml>\n", 200, "success"},
		{"QR code as PNG", "GET", "/wechat/qr.png" + ticket, "", 200, "PNG"},
		{"QR code as SVG", "GET", "/wechat/qr.svg" + ticket, "", 200, "image/svg+xml <svg"},
		{"QR code as text", "GET", "/wechat/qr.txt" + ticket, "", 200, plainText + " ████"},
		{"QR code in dark on light", "GET", "/wechat/qr.txt" + ticket + "&invert=1", "", 200, plainText + "     "},
		{"QR code by the digest that it shows", "GET", "/wechat/qr.png" + photographed, "", 404, "not_found"},
		{"QR code of no ticket", "GET", "/wechat/qr.txt", "", 404, "not_found"},
		{"poll of a pending ticket", "GET", poll + ticket, "", 200, `"status":"pending","expiresIn":300}`},
		{"poll of an unknown ticket", "GET", poll + "?ticket=x&wait=25", "", 200, expired},
		{"poll of no ticket", "GET", poll, "", 400, "missing_ticket"},
		{"poll of an empty ticket", "GET", poll + "?ticket=", "", 200, expired},
		{"poll with a nonsensical wait", "GET", poll + ticket + "&wait=x", "", 200, "pending"},
		{"flow B's URL, to be copied", "GET", "/wechat/getauthqr", "", 200, "&response_type=code&"},
		{"login page to go back", "GET", "/?return_to=/7?a=1%26b=2&c", "", 200, `data-return-to="/7?a=1%26b=2&amp;c"`},
		{"login page to go astray", "GET", "/?return_to=//evil.com", "", 200, `data-return-to=""`},
		{"login page to break out of", "GET", "/?return_to=/%22x=%22y", "", 200, `data-return-to="/%22x=%22y"`},
		{"file that proves our domain", "GET", "/MP_verify_aB3xyz.txt", "", 200, plainText + " aB3xyz"},
		{"file that proves another's", "GET", "/MP_verify_other.txt", "", 404, nothing},
		{"phone's page", "GET", "/static/html/loginfailed.html?reason=used", "", 200, "登录未完成"},
		{"script", "GET", "/static/wxscan.js", "", 200, "text/javascript"},
		{"no listing of static", "GET", "/static/", "", 404, nothing},
		{"no listing below static", "GET", "/static/html", "", 404, nothing},
		{"no page that is yet to be filled in", "GET", "/static/index.html", "", 404, nothing},
		{"no file outside static", "GET", "/static/%2e%2e/main.go", "", 404, nothing},
		{"unknown path of another method", "POST", "/nothing", "", 404, nothing},
		{"nothing of the simulator below its path", "GET", "/demo/nothing", "", 404, ""},
		{"health", "GET", "/healthz", "", 200, "ok"},
		{"wrong method", "PUT", message, "", 405, "GET, HEAD, POST" + badMethod},
		{"wrong method with a trailing slash", "PUT", message + "/", "", 405, "GET, HEAD, POST" + badMethod},
		{"wrong method, and HEAD is none", "PUT", "/wechat/getauthqr", "", 405, "GET" + badMethod},
		{"the login page is not deleted", "DELETE", "/", "", 405, "GET, HEAD" + badMethod},
		{"HEAD begins no scan", "HEAD", "/wechat/getloginqr", "", 405, "GET application/json"},
		{"HEAD begins no authorization", "HEAD", "/wechat/getauthqr", "", 405, "GET application/json"},
		{"HEAD on the callback logs nobody in", "HEAD", callback, "", 405, "GET application/json"},
		{"HEAD of a page", "HEAD", "/", "", 200, "text/html"},
		{"HEAD of a picture", "HEAD", "/wechat/qr.png" + ticket, "", 200, "image/png"},
		{"a logout is POSTed", "GET", "/wechat/logout", "", 405, "POST" + badMethod},
		{"a preflight of nobody we allow", "OPTIONS", poll, "", 405, "GET, HEAD" + badMethod},
	} {
		t.Run(test.name, func(t *testing.T) {
			out := w.do(test.method, test.target, test.body)
			header := out.Header()
			said := header.Get("Allow") + " " + header.Get("Content-Type") + " " + out.Body.String()
			if out.Code != test.status || !strings.Contains(said, test.want) {
				t.Errorf("%d %.200q, want %d and %q", out.Code, said, test.status, test.want)
			}
			wantPolicy, kept := policy, "no-store"
			switch kind := header.Get("Content-Type"); {
			case out.Code == 200 && strings.HasPrefix(test.target, "/static/"):
				wantPolicy, kept = pagePolicy, "no-cache"
			case out.Code == 200 && strings.HasPrefix(kind, "text/html"):
				wantPolicy = pagePolicy
			case out.Code == 200 && strings.HasPrefix(test.target, "/wechat/qr."):
				kept = header.Get("Cache-Control") // it depends on the ticket
			}
			equal(t, "Content-Security-Policy", header.Get("Content-Security-Policy"), wantPolicy)
			equal(t, "Cache-Control", header.Get("Cache-Control"), kept)
			equal(t, "X-Content-Type-Options", header.Get("X-Content-Type-Options"), "nosniff")
			equal(t, "Referrer-Policy", header.Get("Referrer-Policy"), "same-origin")
		})
	}
	equal(t, "after all that flow A's ticket is", w.check(t, scan.Ticket, "").Status, statusPending)
	equal(t, "and flow B's", w.check(t, auth.Ticket, "").Status, statusPending)
	equal(t, "tickets", w.local.count.Load(), 4) // one is the code's, one a row's
	log := w.logged.String()
	for _, says := range []string{`level=WARN msg="request failed" route="GET /wechat/message" status=403`,
		`level=DEBUG msg="request failed" route=/ status=404`} {
		if !strings.Contains(log, says) || strings.Contains(log, "echostr") {
			t.Errorf("the log tells URLs, or does not say %s: %s", says, log)
		}
	}
	out := httptest.NewRecorder()
	w.fail(out, httptest.NewRequest("GET", "/", nil), errors.New("what is inside"))
	if out.Code != 500 || !strings.HasPrefix(out.Body.String(), `{"error":"internal","message":"something went wrong`) {
		t.Errorf("an error that nobody knows: %d %s", out.Code, out.Body)
	}
	etag := w.do("GET", "/static/wxscan.js", "").Header().Get("ETag")
	equal(t, "a file once more", w.do("GET", "/static/wxscan.js", "", "If-None-Match", etag).Code, 304)
}

func TestLogin(t *testing.T) {
	const ok, failed = "/static/html/loginsucceed.html", "/static/html/loginfailed.html?reason="
	nobody, alice := login{}, login{OpenID: "alice"}
	profile := login{"alice", "union-alice", "alice", "http://127.0.0.1:80/static/demo/avatar.svg"}
	for _, test := range []struct {
		name, begin, event, setting string
		shown                       string // on the phone
		want                        login
	}{
		{"flow A, by a follower", "getloginqr", "scan", "", "您已登录 127.0.0.1:80（20:00）", alice},
		{"flow A, by somebody new", "getloginqr", "subscribe", "", "to 127.0.0.1:80 (20:00 Beijing time)", alice},
		{"flow A, in safe mode", "getloginqr", "scan",
			"WECHAT_AES_KEY=" + docKey, "您已登录 127.0.0.1:80（20:00）", alice},
		{"flow B", "getauthqr", "allow", "", ok, alice},
		{"flow B, with a profile", "getauthqr", "allow", "WECHAT_SCOPE=snsapi_userinfo", ok, profile},
		{"flow A, not followed", "getloginqr", "decline", "", "没有关注", nobody},
		{"flow B, declined", "getauthqr", "decline", "", failed + "denied", nobody},
		{"flow B, virtual user", "getauthqr", "snapshot", "", failed + "snapshot", nobody},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				time.Sleep(12 * time.Hour) // a bubble begins at midnight UTC
				w := newWorld(t, test.setting)
				qr, other := w.begin(t, test.begin), w.begin(t, test.begin)
				if qr.ExpiresIn != 300 || qr.URL == "" || len(qr.Ticket) < 26 || qr.Ticket == other.Ticket ||
					!strings.Contains(qr.QRURL, qr.Ticket) {
					t.Errorf("%+v", qr)
				}
				if _, shown := w.scan(qr.Ticket, "alice", test.event); !strings.Contains(shown, test.shown) {
					t.Errorf("the phone shows %q, want %q", shown, test.shown)
				}
				pending := pollAnswer{Status: statusPending, ExpiresIn: 300}
				got, want := w.check(t, qr.Ticket, ""), pending
				equal(t, "the poll that is asked again", w.check(t, qr.Ticket, ""), got)
				if test.want != nobody {
					want = pollAnswer{Login: true, Status: statusDone, login: test.want, Token: got.Token}
					claims, err := w.signer.verify(got.Token)
					must(t, err)
					equal(t, "the token's openid", claims.OpenID, "alice")
					equal(t, "its ID tells the scene", claims.ID == digest(qr.Ticket).String(), false)
				}
				equal(t, "poll", got, want)
				equal(t, "another browser's poll", w.check(t, other.Ticket, ""), pending)
			})
		})
	}
}

func TestCallback(t *testing.T) {
	w := newWorld(t)
	scan, auth, another := w.begin(t, "getloginqr"), w.begin(t, "getauthqr"), w.begin(t, "getauthqr")
	const ok, failed = "loginsucceed.html", "loginfailed.html?reason="
	state, good := digest(auth.Ticket).String(), w.code(t, "alice", "allow")
	for _, test := range []struct{ name, state, code, want string }{
		{"no state", "", good, failed + "expired"},
		{"state of no ticket", digest("x").String(), good, failed + "expired"},
		{"the ticket itself as the state", auth.Ticket, good, failed + "expired"},
		{"ticket of flow A", digest(scan.Ticket).String(), good, failed + "expired"},
		{"no code", state, "", failed + "denied"},
		{"declined", state, "authdeny", failed + "denied"},
		{"made-up code", state, "made-up", failed + "expired"},
		{"good code", state, good, ok},
		{"the same callback again", state, good, ok},
		{"another's code after the login", state, w.code(t, "bob", "allow"), failed + "used"},
		{"declined after the login", state, "authdeny", failed + "denied"},
		{"a code that was used for another ticket", digest(another.Ticket).String(), good, failed + "used"},
	} {
		equal(t, test.name+" leads", w.back(test.state, test.code, ""), test.want)
	}
	equal(t, "exchanges", w.called("/sns/oauth2/access_token"), 3)
	equal(t, "logged in", w.check(t, auth.Ticket, "").OpenID, "alice")
}

// back opens the callback, and returns the page of static/html that it leads to.
func (w *world) back(state, code, peer string) (page string) {
	callback := "/wechat/accessusercode?" + url.Values{"state": {state}, "code": {code}}.Encode()
	return strings.TrimPrefix(w.do("GET", callback, "", "peer", peer).Header().Get("Location"), "/static/html/")
}

func TestACallbackOpenedTwiceAtOnceIsExchangedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		state, code, start := digest(w.begin(t, "getauthqr").Ticket).String(), w.code(t, "alice", "allow"), time.Now()
		w.setFault(func(http.ResponseWriter, *http.Request) bool { time.Sleep(3 * time.Second); return false })
		var both sync.WaitGroup
		for range 2 {
			both.Go(func() { equal(t, "it leads", w.back(state, code, ""), "loginsucceed.html") })
		}
		both.Wait()
		equal(t, "both are answered after", time.Since(start), 3*time.Second)
		equal(t, "exchanges", w.called("/sns/oauth2/access_token"), 1)
		late := digest(w.begin(t, "getauthqr").Ticket).String()
		time.Sleep(298 * time.Second) // it ends while its code is exchanged
		page := w.back(late, w.code(t, "bob", "allow"), "")
		equal(t, "where the ticket has ended it leads", page, "loginfailed.html?reason=expired")
	})
}

// Whoever sees flow A's QR code can make WeChat's ticket: of the link that the
// code shows, the time and the ticket's life.
func TestAPhotographOfTheCodeTakesNoLogin(t *testing.T) {
	for _, confirm := range []string{"false", "true"} {
		for _, begin := range []string{"getloginqr", "getauthqr"} {
			w := newWorld(t, "CONFIRM="+confirm)
			qr := w.begin(t, begin)
			guesses := []string{digest(qr.Ticket).String(), qr.URL}
			for i := range 298 {
				at := time.Now().Add(time.Duration(i-149) * time.Second)
				guesses = append(guesses, wechatTicket(qr.URL, at, 5*time.Minute))
			}
			isRight := func(guess string) bool { return strings.HasSuffix(qr.WeChatQRURL, "="+url.QueryEscape(guess)) }
			if begin == "getloginqr" && !slices.ContainsFunc(guesses, isRight) {
				t.Fatalf("WeChat's ticket, in %s, is not among the guesses", qr.WeChatQRURL)
			}
			for _, when := range []string{"before the scan", "after the scan"} {
				for _, guess := range guesses {
					if got := w.check(t, guess, ""); got != (pollAnswer{Status: statusExpired}) {
						t.Errorf("%s, CONFIRM=%s, %s: %q polls the login: %+v", begin, confirm, when, guess, got)
					}
				}
				w.scan(qr.Ticket, "alice", "")
			}
			if got := w.check(t, qr.Ticket, "").Status; got != statusDone && got != statusScanned {
				t.Errorf("%s: the owner of the ticket sees %q", begin, got)
			}
		}
	}
}

// A person with made-up codes must not deny the login to the right one.
func TestMadeUpCodesDenyNobodyTheLogin(t *testing.T) {
	w := newWorld(t)
	ticket := w.begin(t, "getauthqr").Ticket
	state := digest(ticket).String()
	for i := range 25 {
		want := "loginfailed.html?reason=expired"
		if i >= 10 {
			want = "loginfailed.html?reason=unavailable"
		}
		equal(t, "made-up code "+strconv.Itoa(i), w.back(state, "made-up"+strconv.Itoa(i), "203.0.113.66:1"), want)
	}
	equal(t, "made-up codes of one client reached WeChat", w.called("/sns/oauth2/access_token"), 10)
	equal(t, "alice's phone", w.back(state, w.code(t, "alice", "allow"), "203.0.113.7:1"), "loginsucceed.html")
	equal(t, "logged in", w.check(t, ticket, "").OpenID, "alice")
	for range 11 { // of the same office
		state := digest(w.begin(t, "getauthqr").Ticket).String()
		equal(t, "bob's phone", w.back(state, w.code(t, "bob", "allow"), "203.0.113.7:1"), "loginsucceed.html")
	}
}

func TestFlowBWorksWhileFlowAFails(t *testing.T) {
	w := newWorld(t)
	w.setFault(refusing("stable_token", 40164, "invalid ip 203.0.113.7, not in whitelist rid: 1"))
	out := w.do("GET", "/wechat/getloginqr", "")
	if got := out.Body.String(); out.Code != 502 || !strings.Contains(got, `{"error":"wechat_refused",`) ||
		!strings.Contains(got, `"errcode":40164`) || strings.Contains(got, "203.0.113.7") {
		t.Errorf("flow A: %d %s", out.Code, got)
	}
	for _, word := range []string{"203.0.113.7", "rid: 1", "IP白名单"} {
		if log := w.logged.String(); !strings.Contains(log, word) {
			t.Errorf("the log does not tell %q: %s", word, log)
		}
	}
	qr := w.begin(t, "getauthqr")
	w.scan(qr.Ticket, "alice", "")
	equal(t, "flow B's login", w.check(t, qr.Ticket, "").OpenID, "alice")
}

func TestTooManyTickets(t *testing.T) {
	w := newWorld(t, "MAX_TICKETS=1")
	w.begin(t, "getauthqr")
	for _, path := range []string{"/wechat/getauthqr", "/wechat/getloginqr"} {
		out := w.do("GET", path, "")
		equal(t, path, out.Code, 503)
		equal(t, "Retry-After", out.Header().Get("Retry-After"), "5")
		equal(t, "error", out.Body.String()[:len(`{"error":"too_many_tickets"`)], `{"error":"too_many_tickets"`)
	}
	equal(t, "calls of WeChat for nothing", w.called("/cgi-bin/qrcode/create"), 0)
}

// equal complains unless got is what is wanted.
func equal[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// newLocalServer serves h on loopback and returns its URL.
func newLocalServer(t testing.TB, h http.Handler) string {
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return server.URL
}

func TestStrangersCannotFillTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "TICKET_TTL=1h")
		state := digest(w.begin(t, "getauthqr").Ticket).String()
		for minute := 1; minute <= 2; minute++ {
			for i := range 1000 {
				w.do("POST", "/wechat/message?signature=x", "")
				w.back(state, "made-up", fmt.Sprintf("10.0.%d.%d:1", i/250, i%250))
			}
			log := w.logged.String()
			equal(t, "lines of bad signatures, and of too many", strings.Count(log, "request failed"), 610*minute)
			equal(t, "lines of made-up codes", strings.Count(log, "no login by web authorization"), 600*minute)
			time.Sleep(time.Minute)
		}
	})
}

// The worst that can stand in an openid or a nickname.
const nasty = "<script>alert(1)</script>\"'%s%00\r\nlevel=ERROR msg=forged\u2028\u202e]]>&amp;\t"

func TestNastyNamesAreData(t *testing.T) {
	w := newWorld(t, "WECHAT_SCOPE=snsapi_userinfo")
	encoded := func(v object) string { data, _ := json.Marshal(v); return string(data) }
	w.setFault(saying("/oauth2/access_token", encoded(object{"openid": nasty + "\x00", "access_token": "t"}),
		"/userinfo", encoded(object{"openid": nasty, "nickname": nasty + "\x00", "headimgurl": "javascript:alert(1)"}),
		"/create", encoded(object{"errcode": 40097, "errmsg": nasty})))
	auth := w.begin(t, "getauthqr")
	w.scan(auth.Ticket, "x", "")
	got := w.check(t, auth.Ticket, "")
	equal(t, "login", got.login, login{nasty + "\x00", "", nasty + "\x00", "javascript:alert(1)"})
	out := w.do("GET", "/wechat/checklogin?ticket="+auth.Ticket, "")
	if raw := out.Body.String(); strings.ContainsAny(raw, "\r\x00\u2028") || strings.Count(raw, "\n") != 1 {
		t.Errorf("raw in JSON: %q", raw)
	}
	equal(t, "JSON with < in it could be taken for a page", out.Header().Get("Content-Type"), "application/json")
	w.do("GET", "/wechat/getloginqr", "")
	w.do("GET", "/wechat/accessusercode?state="+url.QueryEscape(nasty)+"&code="+url.QueryEscape(nasty), "")
	for line := range strings.Lines(w.logged.String()) {
		if !strings.HasPrefix(line, "time=") || strings.Contains(line, "\u2028") {
			t.Errorf("forged log line %q", line)
		}
	}

	w.setFault(nil)
	scan, openID := w.begin(t, "getloginqr"), strings.ReplaceAll(nasty, "\r", " ") // XML has no CR
	var escaped bytes.Buffer
	must(t, xml.EscapeText(&escaped, []byte(openID)))
	out = w.push(pushXML(escaped.String(), "SCAN", "s", scan.Ticket))
	var reply struct {
		XMLName    xml.Name `xml:"xml"`
		ToUserName string
	}
	must(t, xml.Unmarshal(out.Body.Bytes(), &reply))
	equal(t, "reply to", reply.ToUserName, openID)
	equal(t, "logged in", w.check(t, scan.Ticket, "").OpenID, openID)
}

// The polls are parked, for which they let their headers go.
func TestOnlyAFetchOfOurOwnBringsASession(t *testing.T) {
	const own, front, evil = "https://login.example.com", "https://www.example.com", "https://evil.example.com"
	for i, test := range []struct {
		name, site, mode, dest, origin, accept string
		session                                bool
	}{
		{"curl", "", "", "", "", "*/*", true},
		{"an old browser's fetch of ours", "", "", "", own, "*/*", true},
		{"an old browser's fetch of an allowed site's", "", "", "", front, "*/*", true},
		{"an old browser's fetch of another site's", "", "", "", evil, "*/*", false},
		{"an old browser's fetch from a sandbox", "", "", "", "null", "*/*", false},
		{"a link in an old browser", "", "", "", "", "text/html,application/xhtml+xml,*/*;q=0.8", false},
		{"our page's fetch", "same-origin", "cors", "empty", "", "*/*", true},
		{"our page's fetch, of which a proxy lets only this through", "same-origin", "", "", "", "", true},
		{"a link on our page", "same-origin", "navigate", "document", "", "text/html", false},
		{"a link on our page, of which a proxy lets only this through", "same-origin", "navigate", "", "", "", false},
		{"a picture that is posted on our page", "same-origin", "no-cors", "image", "", "image/*", false},
		{"typed, of which a proxy lets only this through", "none", "", "", "", "", false},
		{"an allowed site's fetch", "cross-site", "cors", "empty", front, "*/*", true},
		{"an allowed sibling's fetch", "same-site", "cors", "empty", front, "*/*", true},
		{"an allowed sibling's picture", "same-site", "cors", "image", front, "image/*", false},
		{"a sibling's picture", "same-site", "no-cors", "image", "", "image/*", false},
		{"a sibling's fetch", "same-site", "cors", "empty", evil, "*/*", false},
		{"a sibling's blind fetch", "same-site", "no-cors", "empty", "", "*/*", false},
		{"a fetch that claims to be ours", "same-site", "cors", "empty", own, "*/*", false},
		{"a stranger's fetch", "cross-site", "cors", "empty", evil, "*/*", false},
		{"what nobody knows yet", "near", "cors", "empty", "", "*/*", false},
	} {
		synctest.Test(t, func(t *testing.T) {
			w, start := newWorld(t, "PUBLIC_URL="+own, "ALLOWED_ORIGINS="+front), time.Now()
			ticket := w.begin(t, []string{"getloginqr", "getauthqr"}[i%2]).Ticket
			time.AfterFunc(7*time.Second, func() { w.scan(ticket, "mallory", "") })
			out := w.do("GET", "/wechat/checklogin?wait=25&ticket="+ticket, "", "Sec-Fetch-Site", test.site,
				"Sec-Fetch-Mode", test.mode, "Sec-Fetch-Dest", test.dest, "Origin", test.origin, "Accept", test.accept)
			equal(t, "the poll wakes at the scan, after", time.Since(start), 7*time.Second)
			equal(t, test.name+" is told", strings.Contains(out.Body.String(), `"token"`), true)
			equal(t, test.name+" keeps the session", len(out.Result().Cookies()) == 1, test.session)
		})
	}
}

// What pages of other sites may have our server do, and what they may read.
func TestOtherSitesSpendAndReadNothingUnlessAllowed(t *testing.T) {
	const own, front, evil = "https://login.example.com", "https://www.example.com", "https://evil.example.com"
	closed := newWorld(t)
	w := newWorld(t, "PUBLIC_URL=https://Login.Example.com:443", "QR_RATE=3", // as browsers do not write origins
		"ALLOWED_ORIGINS=HTTPS://WWW.Example.com:443,https://www.example.com:80,http://[2001:DB8:0:0::1]:80")
	ask := func(w *world, method, path, site, origin string) *httptest.ResponseRecorder {
		return w.do(method, path, "", "peer", "203.0.113.7:1", "Sec-Fetch-Site", site, "Origin", origin)
	}
	const begin, logout, confirm = "GET /wechat/getauthqr", "POST /wechat/logout", "POST /wechat/confirm"
	for _, test := range []struct {
		name, route, site, origin string
		status                    int
	}{
		{"a picture anywhere", begin, "cross-site", "", 403},
		{"a picture anywhere, of flow A", "GET /wechat/getloginqr", "cross-site", "", 403},
		{"a sibling's picture", begin, "same-site", "", 403},
		{"a sibling's picture, of flow A", "GET /wechat/getloginqr", "same-site", "", 403},
		{"a stranger's fetch", begin, "cross-site", evil, 403},
		{"a sandbox's fetch", begin, "cross-site", "null", 403},
		// None of the refusals counts against the client.
		{"our page's fetch", begin, "same-origin", "", 200},
		{"typed by hand", begin, "none", "", 200},
		{"an allowed sibling's fetch", begin, "same-site", front, 200},
		{"our page's logout", logout, "same-origin", "", 204},
		{"our page's logout in an old browser, behind a proxy", logout, "", own, 204},
		{"a stranger's logout", logout, "cross-site", evil, 403},
		{"a sibling's logout", logout, "same-site", "", 403},
		{"our phone's answer", confirm, "", own, 303},
		{"a stranger's answer in an old browser", confirm, "", evil, 403},
		{"a sandbox's answer", confirm, "", "null", 403},
	} {
		method, path, _ := strings.Cut(test.route, " ")
		out := ask(w, method, path, test.site, test.origin)
		refused := strings.HasPrefix(out.Body.String(), `{"error":"cross_origin","message":"another site may not`)
		if out.Code != test.status || refused != (test.status == 403) {
			t.Errorf("%s: %d %s, want %d", test.name, out.Code, out.Body, test.status)
		}
	}
	equal(t, "QR codes of WeChat's that are spent", w.called("/cgi-bin/qrcode/create"), 0)
	equal(t, "tickets", w.local.count.Load(), 3)
	if log := w.logged.String(); !strings.Contains(log, `route="POST /wechat/logout" status=403`) {
		t.Errorf("the log does not say what was refused: %s", log)
	}

	allowed := func(w *world, method, path, origin string) string {
		header := ask(w, method, path, "cross-site", origin).Header()
		if header.Get("Access-Control-Allow-Origin") != "" {
			equal(t, "Vary", header.Get("Vary"), "Origin")
			equal(t, "with cookies", header.Get("Access-Control-Allow-Credentials"), "true")
		}
		return header.Get("Access-Control-Allow-Origin")
	}
	for _, method := range []string{"GET", "OPTIONS"} {
		for _, path := range []string{"getloginqr", "getauthqr", "getlogincode", "checklogin", "session"} {
			for _, origin := range []string{front, front + ":80", "http://[2001:db8::1]"} {
				equal(t, method+" "+path+" is for", allowed(w, method, "/wechat/"+path, origin), origin)
			}
			for _, origin := range []string{"null", front + ".evil.com", "http://www.example.com", "*", evil} {
				equal(t, method+" "+path+" is for", allowed(w, method, "/wechat/"+path, origin), "")
			}
			equal(t, "without ALLOWED_ORIGINS", allowed(closed, method, "/wechat/"+path, front), "")
		}
		for _, path := range []string{"/wechat/logout", "/wechat/message", "/wechat/qr.png", "/", "/wechat/confirm"} {
			equal(t, method+" "+path+" is for", allowed(w, method, path, front), "")
		}
	}
}

func TestPicturesAreKeptAsLongAsTheirTicketAndDrawnTenTimesAsOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "QR_RATE=3")
		picture := "/wechat/qr.svg?ticket=" + w.begin(t, "getauthqr").Ticket
		const one, other, no = "203.0.113.7:1", "203.0.113.8:1", "no-store"
		look := func(path, peer string, status int, kept string) {
			t.Helper()
			out := w.do("GET", path, "", "peer", peer)
			equal(t, path, out.Code, status)
			equal(t, "Cache-Control", out.Header().Get("Cache-Control"), kept)
			equal(t, "Retry-After after 429", out.Header().Get("Retry-After") == "60", status == 429)
		}
		for range 30 {
			look(picture, one, 200, "private, max-age=300")
			look("/wechat/qr.png?ticket=none", one, 404, no) // costs nothing, and does not count
		}
		look(picture, one, 429, no)
		look(picture, other, 200, "private, max-age=300")
		look("/wechat/getauthqr", one, 200, no)
		time.Sleep(time.Minute)
		look(picture, one, 200, "private, max-age=240")
		time.Sleep(4*time.Minute - time.Second/2)
		look(picture, one, 200, "private, max-age=0") // rather too short than too long
		time.Sleep(time.Second / 2)
		look(picture, one, 404, no)
	})
}

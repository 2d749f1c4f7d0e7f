package main

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// start runs wxscan and returns its URL, once it listens, and all its output. stop ends it.
func start(t *testing.T, getenv func(string) string, args ...string) (
	url string, logged *syncBuffer, stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended, logged := make(chan error, 1), new(syncBuffer)
	go func() { ended <- run(ctx, args, getenv, logged, io.MultiWriter(logged, t.Output())) }()
	stop = sync.OnceValue(func() error { cancel(); return <-ended })
	t.Cleanup(func() { stop() })
	return listening(t, logged), logged, stop
}

var listeningLine = regexp.MustCompile(`msg"?[=:]"?listening"?[ ,]"?addr"?[=:]"?([^\s",]+)`)

func listening(t *testing.T, logged *syncBuffer) string {
	t.Helper()
	for range 1000 {
		if line := listeningLine.FindStringSubmatch(logged.String()); line != nil {
			return "http://" + line[1]
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("does not listen: %s", logged)
	return ""
}

// A response is what send got. Without an answer, its status is 0, and its body says why.
type response struct {
	*http.Response
	body string
}

// send makes a request; headers are names, as they are sent, and values.
func send(client *http.Client, method, url, body string, headers ...string) response {
	none := &http.Response{Status: "no answer"}
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return response{none, err.Error()}
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header[headers[i]] = append(req.Header[headers[i]], headers[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		return response{none, err.Error()}
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return response{none, err.Error()}
	}
	return response{resp, string(text)}
}

func getJSON(t testing.TB, client *http.Client, url string, v any) {
	t.Helper()
	must(t, json.Unmarshal([]byte(send(client, "GET", url, "").body), v))
}

// begun, scanned and polled are a login over HTTP; begin is getloginqr or getauthqr.
func begun(t testing.TB, base, begin string) (qr qrAnswer) {
	t.Helper()
	getJSON(t, http.DefaultClient, base+"/wechat/"+begin, &qr)
	return qr
}

func scanned(t testing.TB, base, ticket, openID string) {
	t.Helper()
	scan := base + "/demo/scan?openid=" + openID + "&ticket=" + url.QueryEscape(ticket)
	equal(t, "the scan is answered", send(http.DefaultClient, "POST", scan, "").StatusCode, 200)
}

func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// allowed returns the callback to which the authorize page leads, once openID has agreed.
func allowed(t testing.TB, page, openID string) (callback string) {
	t.Helper()
	client := http.Client{CheckRedirect: noRedirect}
	resp, err := client.PostForm(page, url.Values{"openid": {openID}, "event": {"allow"}})
	must(t, err)
	resp.Body.Close()
	return resp.Header.Get("Location")
}

func polled(t testing.TB, base, ticket, wait string) (answer pollAnswer) {
	t.Helper()
	poll := base + "/wechat/checklogin?wait=" + wait + "&ticket=" + url.QueryEscape(ticket)
	getJSON(t, http.DefaultClient, poll, &answer)
	return answer
}

func TestEndToEnd(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ addr, public, aesKey, language, open string }{
		{"127.0.0.1:0", "", docKey, "C", "open"}, {":0", "http://192.168.7.7:8080", "", "zh_CN.UTF-8", "请打开"},
	} {
		getenv := only("PUBLIC_URL="+test.public, "WECHAT_AES_KEY="+test.aesKey, "LANG="+test.language)
		base, logged, stop := start(t, getenv, "-demo", "-addr", test.addr)
		base = "http://127.0.0.1" + base[strings.LastIndex(base, ":"):]
		public := cmp.Or(test.public, base)
		for _, begin := range bothFlows {
			qr := begun(t, base, begin)
			if !strings.HasPrefix(qr.URL, public+"/demo/") {
				t.Errorf("%+v: the phone is sent to %q", test, qr.URL)
			}
			scanned(t, base, qr.Ticket, "alice")
			equal(t, "who is logged in", polled(t, base, qr.Ticket, "25").OpenID, "alice")
		}
		for length, want := range map[int]int{7 << 10: 200, 17 << 10: 431} {
			header := strings.Repeat("x", length)
			equal(t, "a long header", send(http.DefaultClient, "GET", base, "", "X", header).StatusCode, want)
		}
		must(t, stop())
		if got := logged.String(); !strings.HasPrefix(got, test.open+" "+public+"\n") ||
			!strings.Contains(got, "ANYONE CAN LOG IN AS ANYONE") || strings.Contains(got, "interface_url") {
			t.Errorf("-demo says %s", got)
		}
	}
}

// launch starts the program at path as a -demo with settings, and returns its URL
// once it listens. It ends with the test.
func launch(t *testing.T, path string, settings ...string) (base string, cmd *exec.Cmd) {
	t.Helper()
	logged := new(syncBuffer)
	cmd = exec.Command(path, "-demo", "-addr", "127.0.0.1:0", "-qr-rate", "0")
	cmd.Stderr, cmd.Env = logged, append(os.Environ(), settings...)
	must(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill() })
	return listening(t, logged), cmd
}

var (
	programDir   string // where build puts the program
	buildProgram = sync.OnceValue(func() error {
		out, err := exec.Command("go", "build", "-o", programDir, ".").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
)

func TestMain(m *testing.M) {
	flag.Parse()
	flag.Set("test.parallel", "8") // tests that run in parallel mostly wait
	programDir, _ = os.MkdirTemp("", "wxscan")
	code := m.Run()
	endBrowsers()
	os.RemoveAll(programDir)
	os.Exit(code)
}

// build returns the path of the program, built.
func build(t *testing.T) string {
	t.Helper()
	must(t, buildProgram())
	return filepath.Join(programDir, "wxscan")
}

// endsAtOnce parks polls, each of a login of its own, and has all of them answered and
// the server ended, before shutdownGrace is over.
func endsAtOnce(t *testing.T, client *http.Client, base string, polls int, end func() error) {
	t.Helper()
	answers := make(chan pollAnswer, polls)
	for range polls {
		var qr qrAnswer
		getJSON(t, client, base+"/wechat/getauthqr", &qr)
		go func() {
			var answer pollAnswer
			getJSON(t, client, base+"/wechat/checklogin?wait=25&ticket="+qr.Ticket, &answer)
			answers <- answer
		}()
	}
	parked := fmt.Sprintf("\nwxscan_waiting_browsers %d\n", polls)
	eventually(t, "all polls are parked", func() bool {
		metrics := send(client, "GET", base+"/metrics", "", "Authorization", "Bearer letmein")
		return strings.Contains(metrics.body, parked)
	})
	begun := time.Now()
	if err := end(); err != nil || time.Since(begun) > shutdownGrace {
		t.Errorf("ended with %v after %v", err, time.Since(begun))
	}
	for range polls {
		if answer := <-answers; answer.Status != statusPending || answer.ExpiresIn < 200 {
			t.Fatalf("a parked poll is answered %+v", answer)
		}
	}
}

func TestTermAnswersAThousandParkedPolls(t *testing.T) {
	t.Parallel()
	base, cmd := launch(t, build(t), "METRICS_TOKEN=letmein")
	silent, err := net.Dial("tcp", strings.TrimPrefix(base, "http://")) // Shutdown alone would wait for it
	must(t, err)
	defer silent.Close()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1000}}
	endsAtOnce(t, client, base, 1000, func() error {
		must(t, cmd.Process.Signal(syscall.SIGTERM))
		return cmd.Wait()
	})
}

func TestHTTPSHasHTTP2AndReadsAChangedCertificate(t *testing.T) {
	t.Parallel()
	certFile, keyFile := certificate(t)
	base, logged, stop := start(t, with("TLS_CERT="+certFile, "TLS_KEY="+keyFile, "QR_RATE=0", "METRICS_TOKEN=letmein"),
		"-addr", "127.0.0.1:0")
	send(http.DefaultClient, "GET", base, "") // without TLS
	eventually(t, "net/http's words are in our log", func() bool {
		return strings.Contains(logged.String(), `level=WARN msg="http: TLS handshake error`)
	})
	base = "https" + strings.TrimPrefix(base, "http")
	for serial := range int64(2) {
		selfSigned(t, certFile, keyFile, serial+7)
		transport := &http.Transport{ForceAttemptHTTP2: true, MaxConnsPerHost: 1,
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
		t.Cleanup(transport.CloseIdleConnections)
		client := &http.Client{Transport: transport}
		resp := send(client, "GET", base+"/healthz", "")
		if got := resp.TLS.PeerCertificates[0].SerialNumber.Int64(); got != serial+7 || resp.ProtoMajor != 2 ||
			resp.Header.Get("Strict-Transport-Security") != "max-age=31536000" {
			t.Errorf("certificate %d, want %d; %s, %v", got, serial+7, resp.Proto, resp.Header)
		}
		if serial == 1 { // all on one connection
			endsAtOnce(t, client, base, 100, stop)
		}
	}
}

func TestLoginsGoOnWhileNobodyReadsTheLog(t *testing.T) {
	t.Parallel()
	unread, stderr := io.Pipe() // a write waits for a read
	defer unread.Close()
	ctx, stop := context.WithCancel(t.Context())
	base, ended := "http://"+freeAddress(t), make(chan error, 1)
	args := []string{"-demo", "-log-level", "debug", "-addr", strings.TrimPrefix(base, "http://")}
	go func() { ended <- run(ctx, args, none, io.Discard, stderr) }()
	eventually(t, "it listens", func() bool {
		return send(http.DefaultClient, "GET", base+"/healthz", "").StatusCode == 200
	})
	client := &http.Client{Timeout: 10 * time.Second}
	for i := range 1200 { // each a line: more than are held, of two kinds, as 600 of one are logged
		got := send(client, "GET", base+[]string{"/nothing", "/wechat/checklogin"}[i%2], "")
		if got.StatusCode == 0 {
			t.Fatal(got.body)
		}
	}
	for range 20 {
		qr := begun(t, base, "getloginqr")
		scanned(t, base, qr.Ticket, "alice")
		equal(t, "who is logged in", polled(t, base, qr.Ticket, "5").OpenID, "alice")
	}
	stop()
	must(t, <-ended)
}

func TestShutdownWaitsForRequestsInFlight(t *testing.T) {
	t.Parallel()
	release, arrived := make(chan bool), make(chan bool, 2) // a token is fetched, and a QR code made
	weChat := newLocalServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		arrived <- true
		<-release
		io.WriteString(w, `{"access_token":"t","expires_in":7200,"ticket":"t","url":"u"}`)
	}))
	base, _, stop := start(t, with("WECHAT_API_BASE="+weChat), "-addr", "127.0.0.1:0")
	var status int
	var request sync.WaitGroup
	request.Go(func() { status = send(http.DefaultClient, "GET", base+"/wechat/getloginqr", "").StatusCode })
	<-arrived
	time.AfterFunc(200*time.Millisecond, func() { close(release) })
	must(t, stop())
	request.Wait()
	equal(t, "the request in flight ends with", status, 200)
}

// A pipeListener accepts the connections that dial makes in memory, so that
// the server's time-outs can be tested in a synctest bubble.
type pipeListener chan net.Conn

func (l pipeListener) Accept() (net.Conn, error) {
	conn, open := <-l
	if !open {
		return nil, net.ErrClosed
	}
	return conn, nil
}

func (l pipeListener) Close() error   { close(l); return nil }
func (l pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

func (l pipeListener) dial() net.Conn {
	here, there := net.Pipe()
	l <- there
	return here
}

// inMemory serves a world in the current bubble until the test ends, with TLS if
// there are certificates.
func inMemory(t *testing.T, certificates ...tls.Certificate) (*world, pipeListener) {
	w, l := newWorld(t), make(pipeListener)
	listener := net.Listener(l)
	if len(certificates) > 0 {
		listener = tls.NewListener(l, &tls.Config{Certificates: certificates, NextProtos: []string{"h2"}})
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- serve(ctx, listener, w.routes(), w.log) }()
	t.Cleanup(func() { cancel(); must(t, <-ended) })
	return w, l
}

// drip sends one byte a second, and returns how long the server bore it.
func drip(conn net.Conn, head, body string) time.Duration {
	start := time.Now()
	go io.Copy(io.Discard, conn) // until the server closes it
	io.WriteString(conn, head)
	for _, b := range []byte(body) {
		time.Sleep(time.Second)
		if _, err := conn.Write([]byte{b}); err != nil {
			break
		}
	}
	return time.Since(start)
}

func TestDrippingClientsAreCutWithin30Seconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, l := inMemory(t)
		qr := w.begin(t, "getauthqr")
		poll := "GET /wechat/checklogin?wait=30&ticket=" + qr.Ticket + " HTTP/1.1\r\nHost: x\r\n"
		push := "POST /wechat/message?" + w.signed() + " HTTP/1.1\r\nHost: x\r\n"
		const length = "Content-Length: 1000\r\n\r\n"
		var wg sync.WaitGroup
		for name, head := range map[string]string{
			"header": "GET / HTTP/1.1\r\nHost: x\r\nX: ", "nothing": "", "push": push + length,
			"body of a page": "GET / HTTP/1.1\r\nHost: x\r\n" + length, "body of a poll": poll + length,
			"endless chunks": push + "Transfer-Encoding: chunked\r\n\r\n1000\r\n",
		} {
			for range 20 {
				wg.Go(func() {
					if took := drip(l.dial(), head, strings.Repeat("x", 300)); took > 31*time.Second {
						t.Errorf("%s: borne for %v", name, took)
					}
				})
			}
		}
		wg.Wait()
	})
}

// TestParkedPollIsNotCut polls for longer than a request may take to come.
func TestParkedPollIsNotCut(t *testing.T) {
	pair, err := tls.LoadX509KeyPair(certificate(t))
	must(t, err)
	for url, certificates := range map[string][]tls.Certificate{"http://wx.test": nil, "https://wx.test": {pair}} {
		synctest.Test(t, func(t *testing.T) {
			w, l := inMemory(t, certificates...)
			left, dials := 300*time.Second, 0
			// One connection, which a proxy may share among browsers.
			transport := &http.Transport{ForceAttemptHTTP2: true, MaxConnsPerHost: 1,
				TLSClientConfig: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}},
				DialContext: func(context.Context, string, string) (net.Conn, error) {
					dials++
					return l.dial(), nil
				}}
			t.Cleanup(transport.CloseIdleConnections)
			poll := url + "/wechat/checklogin?ticket=" + w.begin(t, "getauthqr").Ticket + "&wait="
			for wait, want := range map[string]time.Duration{"30": maxWait * time.Second, "-1000": 0, "-9223372037": 0,
				"99999999999999999999": maxWait * time.Second} {
				var answer pollAnswer
				time.Sleep(30 * time.Second) // longer than a request may take to come
				start := time.Now()
				getJSON(t, &http.Client{Transport: transport}, poll+wait, &answer)
				left -= want + 30*time.Second
				if took := time.Since(start); answer.Status != statusPending || took != want ||
					answer.ExpiresIn != ceil(left) {
					t.Errorf("%s, wait=%s: %+v after %v", url, wait, answer, took)
				}
			}
			equal(t, "connections, each of which is kept while idle", dials, 1)
		})
	}
}

// memoryOf returns the peak and present resident memory of a process, in bytes.
func memoryOf(t *testing.T, pid int) (peak, now int) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Skipf("no /proc here: %v", err)
	}
	for line := range strings.Lines(string(status)) {
		fmt.Sscanf(line, "VmHWM: %d kB", &peak)
		fmt.Sscanf(line, "VmRSS: %d kB", &now)
	}
	return peak << 10, now << 10
}

// selfSigned writes a certificate for 127.0.0.1 with a serial number, and its key.
func selfSigned(t *testing.T, certFile, keyFile string, serial int64) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	must(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	must(t, os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o600))
}

// certificate writes a certificate and its key to files of their own.
func certificate(t *testing.T) (certFile, keyFile string) {
	t.Helper()
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	selfSigned(t, certFile, keyFile, 1)
	return certFile, keyFile
}

func TestStartSaysWhyItCannotListen(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer taken.Close()
	certFile, keyFile := certificate(t)
	must(t, os.WriteFile(certFile, []byte("half written"), 0o600))
	tell := func(settings ...string) error {
		return run(t.Context(), nil, with(settings...), io.Discard, io.Discard)
	}
	for _, test := range []struct {
		err  error
		want string
	}{
		{tell("ADDR=" + taken.Addr().String()), "ADDR (-addr): another program listens on 127.0.0.1"},
		{tell("ADDR=203.0.113.7:0"), "ADDR (-addr): this computer cannot listen on 203.0.113.7:0"},
		{tell("ADDR=203.0.113.7:0", "LANG=zh_CN.UTF-8"), "ADDR (-addr)：无法监听 203.0.113.7:0"},
		{cannotListen(os.NewSyscallError("bind", syscall.EACCES), ":80", false),
			"ADDR (-addr): this user may not listen on :80: choose a port from 1024"},
		{tell("TLS_CERT="+certFile, "TLS_KEY="+keyFile), "TLS_CERT (-tls-cert), TLS_KEY (-tls-key): "},
	} {
		got := fmt.Sprint(test.err)
		if !strings.HasPrefix(got, test.want) || strings.Contains(got, "\n") {
			t.Errorf("%v, want one line with %q", test.err, test.want)
		}
	}
}

func TestStrangersFillTheLogWithSixtyShortLinesAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		logged := new(syncBuffer)
		log := errorLog(newLog(logged, slog.LevelInfo, "text"))
		for minute := 1; minute <= 2; minute++ {
			for range 100 {
				log.Print("http: TLS handshake error from ", strings.Repeat("x", 1000))
			}
			if lines := strings.Count(logged.String(), "\n"); lines != 60*minute || len(logged.String()) > 400*lines {
				t.Errorf("minute %d: %d lines, %d bytes", minute, lines, len(logged.String()))
			}
			time.Sleep(time.Minute)
		}
	})
}

func TestStartSaysWhatToEnterAndToMakeLonger(t *testing.T) {
	for token, isShort := range map[string]bool{"a2345678901234b": true, "a2345678901234bc": false} {
		base, logged, stop := start(t, with("LOG_FORMAT=json", "WECHAT_TOKEN="+token), "-addr", "127.0.0.1:0")
		for _, path := range []string{"/demo/q/x", "/demo/scan?openid=mallory&ticket=x", "/demo/cgi-bin/token"} {
			for _, method := range []string{"GET", "POST"} {
				equal(t, method+" of the simulator", send(http.DefaultClient, method, base+path, "").StatusCode, 404)
			}
		}
		must(t, stop())
		if got := logged.String(); strings.Contains(got, "WECHAT_TOKEN is short") != isShort || !strings.Contains(got,
			"SESSION_SECRET is not set") || !strings.Contains(got,
			`"interface_url":"https://login.example.com/wechat/message","authorization_domain":"login.example.com"`) {
			t.Errorf("%d characters: %s", len(token), got)
		}
	}
}

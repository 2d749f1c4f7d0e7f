package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	mathrand "math/rand/v2"
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

// start runs wxscan and returns its URL, once it listens. stop ends it.
func start(t *testing.T, getenv func(string) string, args ...string) (
	url string, logged *syncBuffer, stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended, logged := make(chan error, 1), new(syncBuffer)
	go func() { ended <- run(ctx, args, getenv, io.Discard, io.MultiWriter(logged, t.Output())) }()
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

// ask makes a request, whose answer goes to v unless that is nil.
func ask(client *http.Client, method, url string, v any) (status int, err error) {
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		return 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && v != nil {
		err = json.Unmarshal(body, v)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w in %.200q", url, err, body)
	}
	return resp.StatusCode, err
}

func fetchJSON(t testing.TB, method, url string, v any) (status int) {
	t.Helper()
	status, err := ask(http.DefaultClient, method, url, v)
	must(t, err)
	return status
}

// begun, scanned and polled are a login over HTTP; begin is getloginqr or getauthqr.
func begun(t testing.TB, base, begin string) (qr qrAnswer) {
	t.Helper()
	fetchJSON(t, "GET", base+"/wechat/"+begin, &qr)
	return qr
}

func scanned(t testing.TB, base, ticket, openID string) {
	t.Helper()
	scan := base + "/demo/scan?openid=" + openID + "&ticket=" + url.QueryEscape(ticket)
	if status := fetchJSON(t, "POST", scan, nil); status != http.StatusOK {
		t.Errorf("the scan is answered %d", status)
	}
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
	fetchJSON(t, "GET", base+"/wechat/checklogin?wait="+wait+"&ticket="+url.QueryEscape(ticket), &answer)
	return answer
}

func TestEndToEnd(t *testing.T) {
	for _, test := range []struct{ addr, public, aesKey string }{
		{"127.0.0.1:0", "", docKey}, {":0", "http://192.168.7.7:8080", ""},
	} {
		getenv := only("PUBLIC_URL="+test.public, "WECHAT_AES_KEY="+test.aesKey)
		base, logged, stop := start(t, getenv, "-demo", "-addr", test.addr)
		base = "http://127.0.0.1" + base[strings.LastIndex(base, ":"):]
		for _, begin := range []string{"getloginqr", "getauthqr"} {
			qr := begun(t, base, begin)
			if !strings.HasPrefix(qr.URL, cmp.Or(test.public, base)+"/demo/") {
				t.Errorf("%+v: the phone is sent to %q", test, qr.URL)
			}
			var scan sync.WaitGroup
			scan.Go(func() {
				time.Sleep(50 * time.Millisecond)
				scanned(t, base, qr.Ticket, "alice")
			})
			if answer := polled(t, base, qr.Ticket, "25"); !answer.Login || answer.OpenID != "alice" {
				t.Errorf("%s: %+v", begin, answer)
			}
			scan.Wait()
		}
		if !strings.Contains(logged.String(), "ANYONE CAN LOG IN AS ANYONE") {
			t.Error("-demo does not say that anyone can log in as anyone")
		}
		must(t, stop())
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

// parkedPolls begins logins and parks a poll for each.
func parkedPolls(t *testing.T, client *http.Client, base string, polls int) (answers chan pollAnswer) {
	t.Helper()
	answers = make(chan pollAnswer, polls)
	for range polls {
		var qr qrAnswer
		_, err := ask(client, "GET", base+"/wechat/getauthqr", &qr)
		must(t, err)
		go func() {
			var answer pollAnswer
			ask(client, "GET", base+"/wechat/checklogin?wait=25&ticket="+qr.Ticket, &answer)
			answers <- answer
		}()
	}
	time.Sleep(500 * time.Millisecond) // let them park
	if len(answers) > 0 {
		t.Fatal("polls end before the shutdown")
	}
	return answers
}

// endsAtOnce has all parked polls answered and the server ended within two seconds.
func endsAtOnce(t *testing.T, answers chan pollAnswer, end func() error) {
	t.Helper()
	begun := time.Now()
	if err := end(); err != nil || time.Since(begun) > 2*time.Second {
		t.Errorf("ended with %v after %v", err, time.Since(begun))
	}
	for range cap(answers) {
		if answer := <-answers; answer.Status != statusPending || answer.ExpiresIn < 200 {
			t.Fatalf("a parked poll is answered %+v", answer)
		}
	}
}

func TestTermAnswersAThousandParkedPolls(t *testing.T) {
	base, cmd := launch(t, build(t))
	silent, err := net.Dial("tcp", strings.TrimPrefix(base, "http://")) // Shutdown alone would wait for it
	must(t, err)
	defer silent.Close()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1000}}
	endsAtOnce(t, parkedPolls(t, client, base, 1000), func() error {
		must(t, cmd.Process.Signal(syscall.SIGTERM))
		return cmd.Wait()
	})
}

func TestShutdownAnswersThePollsParkedOnOneHTTP2Connection(t *testing.T) {
	base, client, stop := startTLS(t)
	resp, err := client.Get(base + "/healthz")
	must(t, err)
	resp.Body.Close()
	if resp.ProtoMajor != 2 || resp.Header.Get("Strict-Transport-Security") != "max-age=31536000" {
		t.Errorf("answered by %s, %v", resp.Proto, resp.Header)
	}
	endsAtOnce(t, parkedPolls(t, client, base, 100), stop)
}

func TestLoginsGoOnWhileNobodyReadsTheLog(t *testing.T) {
	unread, stderr := io.Pipe() // a write waits for a read
	defer unread.Close()
	ctx, stop := context.WithCancel(t.Context())
	address := freeAddress(t)
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, []string{"-demo", "-addr", address}, none, io.Discard, stderr) }()
	base := "http://" + address
	for range 500 {
		if _, err := ask(http.DefaultClient, "GET", base+"/wechat/getauthqr", nil); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	for range 20 {
		qr := begun(t, base, "getloginqr")
		scanned(t, base, qr.Ticket, "alice")
		if got := polled(t, base, qr.Ticket, "5"); got.OpenID != "alice" {
			t.Fatalf("%+v", got)
		}
	}
	stop()
	must(t, <-ended)
}

func TestShutdownWaitsForRequestsInFlight(t *testing.T) {
	release, arrived := make(chan bool), make(chan bool, 2) // a token is fetched, and a QR code made
	weChat := newLocalServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		arrived <- true
		<-release
		io.WriteString(w, `{"access_token":"t","expires_in":7200,"ticket":"t","url":"u"}`)
	}))
	base, _, stop := start(t, with("WECHAT_API_BASE="+weChat), "-addr", "127.0.0.1:0")
	status := make(chan int, 1)
	go func() {
		got, _ := ask(http.DefaultClient, "GET", base+"/wechat/getloginqr", nil)
		status <- got
	}()
	<-arrived
	time.AfterFunc(200*time.Millisecond, func() { close(release) })
	must(t, stop())
	if got := <-status; got != 200 {
		t.Errorf("the request in flight ends with %d", got)
	}
}

// A pipeListener accepts the connections that dial makes in memory, so that
// the server's time-outs can be tested in a synctest bubble.
type pipeListener struct{ conns, closed chan net.Conn }

func (l pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l pipeListener) Close() error   { close(l.closed); return nil }
func (l pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

func (l pipeListener) dial() net.Conn {
	here, there := net.Pipe()
	l.conns <- there
	return here
}

// inMemory serves a world in the current bubble until the test ends, with TLS if
// there are certificates.
func inMemory(t *testing.T, certificates ...tls.Certificate) (*world, pipeListener) {
	w, l := newWorld(t), pipeListener{make(chan net.Conn), make(chan net.Conn)}
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
		time.Sleep(5 * time.Second)
		conn := l.dial() // amid all that a login goes through
		io.WriteString(conn, poll+"\r\n")
		w.scan(qr.Ticket, "alice", "")
		answer := make([]byte, 4096)
		if n, _ := conn.Read(answer); !strings.Contains(string(answer[:n]), `"openid":"alice"`) {
			t.Errorf("%s", answer[:n])
		}
		conn.Close()
		wg.Wait()
	})
}

func TestParkedPollIsNotCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, l := inMemory(t)
		qr := w.begin(t, "getauthqr")
		conn, start := l.dial(), time.Now()
		defer conn.Close()
		left := 300 * time.Second
		// On one connection, which a proxy may share among browsers.
		for _, wait := range []string{"30", "99999999999999999999", "-1000", "-9223372037", "30"} {
			fmt.Fprintf(conn, "GET /wechat/checklogin?wait=%s&ticket=%s HTTP/1.1\r\nHost: x\r\n\r\n", wait, qr.Ticket)
			want := maxWait * time.Second
			if wait[0] == '-' {
				want = 0
			}
			left -= want
			answer := make([]byte, 4096)
			n, err := conn.Read(answer)
			pending := fmt.Sprintf(`"status":"pending","expiresIn":%d`, ceil(left))
			took := time.Since(start)
			if err != nil || took != want || !strings.Contains(string(answer[:n]), pending) {
				t.Fatalf("%q, %v after %v", answer[:n], err, took)
			}
			start = time.Now()
		}
	})
}

func TestGarbageOnTheWireHarmsNobody(t *testing.T) {
	const post, length, long = "POST /wechat/message HTTP/1.1\r\nHost: x\r\n", "Content-Length: 5\r\n", 40 << 10
	synctest.Test(t, func(t *testing.T) {
		w, l := inMemory(t)
		for name, test := range map[string]struct{ bytes, statuses string }{
			"binary":           {"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\xff\r\n\r\n", "400"},
			"two lengths":      {post + length + "Content-Length: 6\r\n\r\nhello", "400"},
			"obscured chunks":  {post + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "501"},
			"40 KiB of header": {"GET / HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", long) + "\r\n\r\n", "431"},
			"40 KiB of path":   {"GET /" + strings.Repeat("x", long) + " HTTP/1.1\r\nHost: x\r\n\r\n", "431"},
		} {
			conn := l.dial()
			conn.SetDeadline(time.Now().Add(time.Minute))
			go io.WriteString(conn, test.bytes)
			answer, _ := io.ReadAll(conn)
			conn.Close()
			statuses := regexp.MustCompile(`HTTP/1.1 (\d+)`).FindAllSubmatch(answer, -1)
			if len(statuses) != 1 || string(statuses[0][1]) != test.statuses {
				t.Errorf("%s: %.80q, want %s once", name, answer, test.statuses)
			}
		}
		w.begin(t, "getloginqr")
	})
}

func TestParallelLoginsDoNotCross(t *testing.T) {
	base, _, _ := start(t, none, "-demo", "-addr", "127.0.0.1:0")
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1000}}
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			openID := fmt.Sprint("user", i)
			pause := func() { time.Sleep(time.Duration(mathrand.IntN(300)) * time.Millisecond) }
			pause()
			var qr qrAnswer
			if _, err := ask(client, "GET", base+"/wechat/"+[]string{"getloginqr", "getauthqr"}[i%2], &qr); err != nil {
				t.Error(err)
				return
			}
			ticket := url.QueryEscape(qr.Ticket)
			wg.Go(func() {
				pause()
				if _, err := ask(client, "POST", base+"/demo/scan?openid="+openID+"&ticket="+ticket, nil); err != nil {
					t.Error(err)
				}
			})
			wait := []string{"", "&wait=25"}[i/2%2]
			for answer := (pollAnswer{}); !answer.Login; {
				_, err := ask(client, "GET", base+"/wechat/checklogin?ticket="+ticket+wait, &answer)
				if err != nil || answer.Login && answer.OpenID != openID || answer.Status == statusExpired {
					t.Errorf("%s: %+v, %v", openID, answer, err)
					return
				}
				if wait == "" {
					pause()
				}
			}
		})
	}
	wg.Wait()
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

// startTLS runs wxscan with https, and returns a client that speaks HTTP/2.
func startTLS(t *testing.T) (base string, client *http.Client, stop func() error) {
	t.Helper()
	certFile, keyFile := certificate(t)
	base, _, stop = start(t, with("TLS_CERT="+certFile, "TLS_KEY="+keyFile, "QR_RATE=0"), "-addr", "127.0.0.1:0")
	transport := &http.Transport{ForceAttemptHTTP2: true, MaxConnsPerHost: 1,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	t.Cleanup(transport.CloseIdleConnections)
	return "https" + strings.TrimPrefix(base, "http"), &http.Client{Transport: transport}, stop
}

// The server's time-out of reading ends before such a poll.
func TestParkedPollIsNotCutOverHTTP2(t *testing.T) {
	pair, err := tls.LoadX509KeyPair(certificate(t))
	must(t, err)
	synctest.Test(t, func(t *testing.T) {
		w, l := inMemory(t, pair)
		transport := &http.Transport{ForceAttemptHTTP2: true}
		transport.DialTLSContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn := tls.Client(l.dial(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
			return conn, conn.HandshakeContext(ctx)
		}
		t.Cleanup(transport.CloseIdleConnections)
		qr, begun := w.begin(t, "getauthqr"), time.Now()
		var answer pollAnswer
		poll := "https://wx.test/wechat/checklogin?wait=30&ticket=" + qr.Ticket
		_, err := ask(&http.Client{Transport: transport}, "GET", poll, &answer)
		if took := time.Since(begun); err != nil || answer.Status != statusPending || took != maxWait*time.Second {
			t.Errorf("%+v, %v after %v", answer, err, took)
		}
	})
}

func TestHTTPSReadsAChangedCertificate(t *testing.T) {
	certFile, keyFile := certificate(t)
	base, _, _ := start(t, with("TLS_CERT="+certFile, "TLS_KEY="+keyFile), "-addr", "127.0.0.1:0")
	for serial := range int64(2) {
		selfSigned(t, certFile, keyFile, serial+7)
		conn, err := tls.Dial("tcp", strings.TrimPrefix(base, "http://"), &tls.Config{InsecureSkipVerify: true})
		must(t, err)
		conn.Close()
		if got := conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64(); got != serial+7 {
			t.Errorf("certificate %d, want %d", got, serial+7)
		}
	}
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

func TestDemoBeginsWithWhatToOpen(t *testing.T) {
	for language, verb := range map[string]string{"C": "open", "zh_CN.UTF-8": "请打开"} {
		ctx, cancel := context.WithCancel(t.Context())
		shown, stdout := io.Pipe()
		ended, logged := make(chan error, 1), new(syncBuffer)
		args := []string{"-demo", "-addr", "127.0.0.1:0"}
		go func() { ended <- run(ctx, args, only("LANG="+language), stdout, logged) }()
		line, err := bufio.NewReader(shown).ReadString('\n')
		must(t, err)
		if want := verb + " " + listening(t, logged) + "\n"; line != want {
			t.Errorf("%q, want %q", line, want)
		}
		cancel()
		must(t, <-ended)
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
	const enter = "https://login.example.com/wechat/message"
	for token, isShort := range map[string]bool{"a2345678901234b": true, "a2345678901234bc": false} {
		_, logged, stop := start(t, with("LOG_FORMAT=json", "WECHAT_TOKEN="+token), "-addr", "127.0.0.1:0")
		must(t, stop())
		var line struct{ InterfaceURL, AuthorizationDomain string }
		lines := strings.Split(strings.ReplaceAll(logged.String(), "_", ""), "\n")
		must(t, json.Unmarshal([]byte(lines[1]), &line))
		if line.InterfaceURL != enter || line.AuthorizationDomain != "login.example.com" {
			t.Errorf("%+v in %s", line, logged)
		}
		if strings.Contains(logged.String(), "WECHAT_TOKEN is short") != isShort {
			t.Errorf("%d characters: %s", len(token), logged)
		}
	}
	_, logged, stop := start(t, none, "-demo", "-addr", "127.0.0.1:0")
	if must(t, stop()); strings.Contains(logged.String(), "interface_url") {
		t.Errorf("-demo tells what to enter: %s", logged)
	}
}

func TestNothingOfTheSimulatorWithoutDemo(t *testing.T) {
	base, _, _ := start(t, with(), "-addr", "127.0.0.1:0")
	qr := begun(t, base, "getauthqr")
	for _, path := range []string{"/demo/q/x", "/demo/scan?openid=mallory&ticket=" + qr.Ticket, "/demo/cgi-bin/token"} {
		for _, method := range []string{"GET", "POST"} {
			if status := fetchJSON(t, method, base+path, nil); status != 404 {
				t.Errorf("%s %s: %d", method, path, status)
			}
		}
	}
}

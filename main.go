// Wxscan lets people log in to a web page by scanning a QR code with WeChat.
//
// It is one program with no database. It talks to one WeChat Official Account
// (公众号; a free test account, 测试号, is enough) and keeps everything in memory.
// wxscan -h tells the commands, the flags and the environment variables.
//
// There are two ways to log in. In flow A the browser shows a parametric QR code
// made by WeChat, and WeChat pushes the scan to us. In flow B it shows the QR
// code of WeChat's web authorization page, and the phone brings us a code that
// says who it is. In both, the browser holds a secret ticket and asks
// /wechat/checklogin until somebody has scanned.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	readTimeout   = 20 * time.Second // of a whole request, its body included
	shutdownGrace = 5 * time.Second  // for the requests in flight
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	stdlog.SetOutput(io.Discard) // where net/http's client quotes answers that nobody asked for
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "wxscan:", err)
		os.Exit(1)
	}
}

// run serves until ctx ends, or runs another command. It returns an error if it
// cannot start, or if check finds a fault.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		if err := command(ctx, args, getenv, stdout); !errors.Is(err, flag.ErrHelp) {
			return err
		}
		args = []string{"-h"}
	}
	config, err := parseConfig(args, getenv, stdout)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	if err != nil {
		return err
	}
	lines := newLineWriter(stderr)
	defer lines.end()
	log := newLog(lines, config.logLevel, config.logFormat)
	listener, err := listen(&config, log)
	if err != nil {
		return err
	}
	if config.demo {
		config.simulate(listener.Addr().(*net.TCPAddr))
	}
	server := newServer(config, log)
	if server.redis != nil {
		if refused, ok := errors.AsType[refusal](server.redis.check(ctx)); ok {
			listener.Close()
			return fmt.Errorf("REDIS_URL: %w", refused)
		}
	}
	var background sync.WaitGroup
	defer background.Wait()
	background.Go(func() { server.work(ctx) })
	log.Info("listening", "addr", listener.Addr().String(), "url", config.publicURL)
	if getenv("SESSION_SECRET") == "" && !config.demo {
		log.Warn("SESSION_SECRET is not set: a restart logs everybody out")
	}
	if config.demo {
		server.demo = newDemo(config, server.wechat.client, server.tickets)
		log.Warn("DEMO: WeChat is simulated, and ANYONE CAN LOG IN AS ANYONE", "open", config.publicURL+"/")
	} else {
		if config.shortToken() {
			log.Warn("WECHAT_TOKEN is short enough to be guessed: make it 16 characters or more, here and on the account's page")
		}
		log.Info("to enter on the account's page", "interface_url", config.interfaceURL(), "authorization_domain", config.domain())
	}
	return serve(ctx, listener, server.routes(), log)
}

// newLog returns a log of the format text or json. An error's text may be what a
// stranger has sent: 300 characters of it are enough.
func newLog(w io.Writer, level slog.Level, format string) *slog.Logger {
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == "err" {
			a.Value = slog.StringValue(fmt.Sprintf("%.300s", a.Value))
		}
		return a
	}}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// listen opens the listen address: host:port, or unix:path for a proxy on the
// same machine; with https if there is a certificate.
func listen(c *config, log *slog.Logger) (net.Listener, error) {
	network, addr := "tcp", c.addr
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		network, addr = "unix", path
		if conn, err := net.Dial(network, path); err == nil {
			conn.Close()
		} else if info, err := os.Lstat(path); err == nil && info.Mode().Type() == os.ModeSocket {
			os.Remove(path) // left over: nobody listens there
		}
	}
	listener, err := net.Listen(network, addr)
	if err == nil && network == "unix" {
		err = os.Chmod(addr, 0o666) // the proxy runs as another user; the folder decides who may
	}
	if err != nil {
		return nil, fmt.Errorf("ADDR (-addr): %w", err)
	}
	if c.tlsCert == "" {
		return listener, nil
	}
	pair, err := tls.LoadX509KeyPair(c.tlsCert, c.tlsKey)
	if err != nil {
		return nil, fmt.Errorf("TLS_CERT and TLS_KEY (-tls-cert, -tls-key): %w", err)
	}
	// HTTP/2, for over HTTP/1.1 a browser has six connections, and a parked poll takes one.
	return tls.NewListener(listener, &tls.Config{GetCertificate: c.reread(&pair, log), NextProtos: []string{"h2", "http/1.1"}}), nil
}

// reread returns what gives pair to TLS, read from its files again when they
// change. While the new files are unusable, the old certificate goes on.
func (c *config) reread(pair *tls.Certificate, log *slog.Logger) func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	var mu sync.Mutex    // guards pair and change
	var change time.Time // of the files, at the last handshake
	return func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		mu.Lock()
		defer mu.Unlock()
		var latest time.Time
		for _, file := range []string{c.tlsCert, c.tlsKey} {
			if info, err := os.Stat(file); err == nil && info.ModTime().After(latest) {
				latest = info.ModTime()
			}
		}
		if latest.Equal(change) {
			return pair, nil
		}
		change = latest
		if changed, err := tls.LoadX509KeyPair(c.tlsCert, c.tlsKey); err == nil {
			pair = &changed
		} else {
			log.Warn("reading the certificate again", "err", err)
		}
		return pair, nil
	}
}

// serve answers requests until ctx ends, which wakes the parked polls. It
// returns once the requests in flight are answered, or shutdownGrace is over.
func serve(ctx context.Context, listener net.Listener, handler http.Handler, log *slog.Logger) error {
	var silent sync.Map // connections that have not sent a byte: Shutdown would wait for them
	server := &http.Server{
		ConnState: func(conn net.Conn, state http.ConnState) {
			if state == http.StateNew {
				silent.Store(conn, nil)
			} else {
				silent.Delete(conn)
			}
		},
		Handler:           handler,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       readTimeout,
		WriteTimeout:      (maxWait + 15) * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    8 << 10, // cookies included; net/http lets 4 KiB more through
		ErrorLog:          stdlog.New(&errorLog{log, newLimiter(60)}, "", 0),
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }() // ends with Shutdown
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	for conn := range silent.Range {
		conn.(net.Conn).Close()
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
	defer cancel()
	if err := server.Shutdown(grace); err != nil {
		log.Warn("requests cut off at shutdown", "err", err)
		server.Close()
	}
	<-failed
	return nil
}

// An errorLog takes the lines of net/http. Strangers cause most of them, such as
// those of bad TLS handshakes, so they are limited.
type errorLog struct {
	log  *slog.Logger
	talk *limiter
}

func (e *errorLog) Write(line []byte) (int, error) {
	if e.talk.pass(one("")) == 0 {
		e.log.Warn("http", "err", strings.TrimSpace(string(line)))
	}
	return len(line), nil
}

// A lineWriter writes the lines of the log in a goroutine of its own: nobody's
// login waits for a terminal that is being scrolled, or a pipe that nobody reads.
type lineWriter struct {
	lines   chan []byte
	ended   chan struct{} // closed by end
	written chan struct{} // closed once nothing more is written
}

func newLineWriter(w io.Writer) *lineWriter {
	l := &lineWriter{make(chan []byte, 1000), make(chan struct{}), make(chan struct{})}
	go func() { // until end
		defer close(l.written)
		for {
			select {
			case line := <-l.lines:
				w.Write(line)
			case <-l.ended:
				for len(l.lines) > 0 {
					w.Write(<-l.lines)
				}
				return
			}
		}
	}()
	return l
}

// Write drops the line when too many wait already.
func (l *lineWriter) Write(line []byte) (int, error) {
	select {
	case l.lines <- bytes.Clone(line):
	default:
	}
	return len(line), nil
}

// end writes what waits, for a second at most.
func (l *lineWriter) end() {
	close(l.ended)
	select {
	case <-l.written:
	case <-time.After(time.Second):
	}
}

// A config is the settings, checked.
type config struct {
	addr                      string
	publicURL                 string // http(s)://host[:port]
	appID, appSecret, token   string
	aesKey                    *aesKey       // nil in plain mode
	ttl                       time.Duration // whole seconds
	maxTickets                int
	maxSkew                   time.Duration  // of a push; 0 is any
	qrRate                    int            // QR codes a minute for one client; 0 is any
	trusted                   []netip.Prefix // proxies besides loopback
	sessionSecrets            []string
	sessionTTL                time.Duration // whole seconds
	confirm                   bool          // a scan must be confirmed on the phone
	allowedOrigins            []string
	verifyFile                string         // MP_verify_xxx.txt, or none
	metricsToken              string         // opens /metrics
	redisURL                  *url.URL       // nil: tickets are kept in memory
	redisCA                   *x509.CertPool // nil: the system's
	redisPrefix               string
	tlsCert, tlsKey           string // files, or none
	logLevel                  slog.Level
	logFormat                 string // text or json
	scope                     string
	apiBase, openBase, mpBase string // no trailing slash
	demo                      bool
}

// simulate fills in what depends on the address of a -demo. The program calls
// its simulator over loopback; phones reach it by the public URL.
func (c *config) simulate(listening *net.TCPAddr) {
	local := *listening
	if local.IP.IsUnspecified() {
		local.IP = net.IPv4(127, 0, 0, 1)
	}
	c.publicURL = cmp.Or(c.publicURL, "http://"+local.String())
	c.apiBase = "http://" + local.String() + "/demo"
	c.openBase, c.mpBase = c.publicURL+"/demo", c.publicURL+"/demo"
}

// A setting comes from the environment or, unless it is a secret, from a flag.
type setting struct {
	env, flag string
	byDefault string
	is        string                  // what it is, for -h and for whoever gets it wrong
	set       func(value string) bool // false if the value is malformed
}

// parsed returns what sets p to what parse makes of a value.
func parsed[T any](p *T, parse func(string) (T, error)) func(string) bool {
	return func(value string) bool {
		var err error
		*p, err = parse(value)
		return err == nil
	}
}

// within is parsed, for whole units from least to most.
func within[T int | time.Duration](p *T, parse func(string) (T, error), unit, least, most T) func(string) bool {
	return func(value string) bool { return parsed(p, parse)(value) && *p%unit == 0 && *p >= least && *p <= most }
}

// listed is parsed, for comma-separated items; an empty value has none.
func listed[T any](p *[]T, parse func(string) (T, error)) func(string) bool {
	return func(value string) bool {
		return value == "" || !slices.ContainsFunc(strings.Split(value, ","), func(item string) bool {
			v, err := parse(item)
			*p = append(*p, v)
			return err != nil
		})
	}
}

// like returns what parses a text that matches a pattern.
func like(pattern string) func(string) (string, error) {
	return func(value string) (string, error) {
		if ok, _ := regexp.MatchString("^("+pattern+")$", value); !ok {
			return "", errors.New("malformed")
		}
		return value, nil
	}
}

// origin is a pattern.
const origin = `https?://([0-9A-Za-z.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?`

// parseOrigin returns an origin as browsers write it: in small letters, an IPv6
// address at its shortest, and without the port that its scheme has anyway.
func parseOrigin(value string) (string, error) {
	value, err := like(origin)(strings.ToLower(value))
	if err != nil {
		return "", err
	}
	u, err := url.Parse(value)
	if err != nil {
		return "", err
	}
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil && ip.Is6() {
		value = strings.Replace(value, u.Hostname(), ip.String(), 1)
	}
	return strings.TrimSuffix(value, map[string]string{"http": ":80", "https": ":443"}[u.Scheme]), nil
}

// settings returns all settings, bound to c.
func (c *config) settings() []setting {
	const (
		base    = origin + `(/[!-~]*)?`
		account = " on the account's page (test account: https://mp.weixin.qq.com/debug/cgi-bin/sandbox?t=sandbox/login)"
	)
	text := func(p *string, pattern string) func(string) bool { return parsed(p, like(pattern)) }
	link := func(p *string, pattern string) func(string) bool {
		return func(value string) bool { return text(p, pattern)(strings.TrimSuffix(value, "/")) }
	}
	return []setting{
		{"WECHAT_APPID", "", "", "the appID (wx and letters and digits)" + account, text(&c.appID, `wx[0-9A-Za-z]+`)},
		{"WECHAT_APPSECRET", "", "", "the appsecret (letters and digits)" + account, text(&c.appSecret, `[0-9A-Za-z]+`)},
		{"WECHAT_TOKEN", "", "", "the Token (3-32 letters and digits) that you make up and type into the interface configuration (接口配置信息)" + account, text(&c.token, `[0-9A-Za-z]{3,32}`)},
		{"WECHAT_AES_KEY", "", "", "the EncodingAESKey (43 letters and digits)" + account + "; unset: plain mode", func(value string) bool {
			return value == "" || parsed(&c.aesKey, parseAESKey)(value)
		}},
		{"WECHAT_API_BASE", "", "https://api.weixin.qq.com", "http(s)://host[:port][/path] in place of WeChat's API", link(&c.apiBase, base)},
		{"WECHAT_OPEN_BASE", "", "https://open.weixin.qq.com", "the same for the authorize page", link(&c.openBase, base)},
		{"WECHAT_MP_BASE", "", "https://mp.weixin.qq.com", "the same for the pictures of QR codes", link(&c.mpBase, base)},
		{"SESSION_SECRET", "", rand.Text() + rand.Text(), "what signs sessions: 32 bytes or more, or several such, comma-separated (openssl rand -hex 32)", listed(&c.sessionSecrets, like(`(?s).{32,}`))},
		{"METRICS_TOKEN", "", "", "what opens /metrics; unset: it stays shut", text(&c.metricsToken, `[!-~]*`)},
		{"REDIS_URL", "", "", "redis[s]://[user:password@]host[:port][/db] of a Redis (7.0 or later) that replicas share; unset: memory", func(value string) bool {
			return value == "" || parsed(&c.redisURL, parseRedisURL)(value)
		}},
		{"REDIS_CA", "", "", "the file of the certificates that rediss:// trusts; unset: the system's", func(value string) bool {
			return value == "" || parsed(&c.redisCA, readCA)(value)
		}},
		{"REDIS_PREFIX", "redis-prefix", "wxscan:", "what our keys in Redis begin with", text(&c.redisPrefix, `[!-~]{0,100}`)},
		{"PUBLIC_URL", "url", "", "http(s)://host[:port] without a path, where phones reach us", func(value string) bool {
			return value == "" && c.demo || link(&c.publicURL, origin)(value) // -demo knows once it listens
		}},
		{"ADDR", "addr", ":8080", "host:port to listen on, or unix:/path of a socket", text(&c.addr, `(?s).+`)},
		{"TICKET_TTL", "ttl", "5m", "the life of a QR code: whole seconds from 1s to 720h",
			within(&c.ttl, time.ParseDuration, time.Second, time.Second, 720*time.Hour)},
		{"MAX_TICKETS", "max-tickets", "100000", "the number of live tickets before 503", within(&c.maxTickets, strconv.Atoi, 1, 1, 1e9)},
		{"WECHAT_SCOPE", "scope", "snsapi_base", "snsapi_base, or snsapi_userinfo for the profile", text(&c.scope, `snsapi_(base|userinfo)`)},
		{"QR_RATE", "qr-rate", "60", "QR codes a minute for one client, to 1000; 0: no limit", within(&c.qrRate, strconv.Atoi, 1, 0, 1000)},
		{"TRUSTED_PROXIES", "trusted-proxies", "", "CIDRs, besides loopback, whose X-Forwarded-For counts", listed(&c.trusted, netip.ParsePrefix)},
		{"PUSH_MAX_SKEW", "push-max-skew", "10m", "how old or early a push may be; 0: any", within(&c.maxSkew, time.ParseDuration, 1, 0, math.MaxInt64)},
		{"SESSION_TTL", "session-ttl", "24h", "the life of a session: whole seconds from 1m to 8760h",
			within(&c.sessionTTL, time.ParseDuration, time.Second, time.Minute, 8760*time.Hour)},
		{"CONFIRM", "confirm", "false", "true: a scan must be confirmed on the phone", parsed(&c.confirm, strconv.ParseBool)},
		{"ALLOWED_ORIGINS", "allowed-origins", "", "exact origins of other front ends, comma-separated", listed(&c.allowedOrigins, parseOrigin)},
		{"WECHAT_VERIFY_FILE", "verify-file", "", "MP_verify_xxx.txt, the file that proves a domain", text(&c.verifyFile, `(MP_verify_[0-9A-Za-z]+\.txt)?`)},
		{"TLS_CERT", "tls-cert", "", "the file of a certificate chain, for https", text(&c.tlsCert, `(?s).*`)},
		{"TLS_KEY", "tls-key", "", "the file of its key", text(&c.tlsKey, `(?s).*`)},
		{"LOG_LEVEL", "log-level", "info", "debug, info, warn or error", func(value string) bool { return c.logLevel.UnmarshalText([]byte(value)) == nil }},
		{"LOG_FORMAT", "log-format", "text", "text or json", text(&c.logFormat, `text|json`)},
	}
}

const usage = `wxscan: log in to a web page by scanning a QR code with WeChat
  wxscan -demo          try it on http://127.0.0.1:8080, with a simulated WeChat; needs nothing
  wxscan                serve; needs WECHAT_APPID, WECHAT_APPSECRET, WECHAT_TOKEN and PUBLIC_URL
  wxscan check [-json]  say what is wrong with the set-up, how to mend it, what to enter where
  wxscan sign [-ticket T -openid O [-event subscribe]]  WeChat's requests, as curl lines
  wxscan version
By environment only: WECHAT_AES_KEY, SESSION_SECRET, METRICS_TOKEN, and WECHAT_API_BASE,
WECHAT_OPEN_BASE, WECHAT_MP_BASE in place of WeChat's hosts. By flag, or environment:
`

// parseConfig reads the settings. Its error is one line that names the setting,
// what is wrong with it and where to get it right; it is flag.ErrHelp after -h,
// whose answer goes to help.
func parseConfig(args []string, getenv func(string) string, help io.Writer) (config, error) {
	var c config
	settings, given := c.settings(), make(map[string]string)
	flags := flag.NewFlagSet("wxscan", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.BoolVar(&c.demo, "demo", false, "")
	for _, s := range settings {
		given[s.env] = getenv(s.env)
		set := func(value string) error { given[s.env] = value; return nil }
		if s.byDefault == "false" {
			flags.BoolFunc(s.flag, "", set)
		} else if s.flag != "" {
			flags.Func(s.flag, "", set)
		}
	}
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(help, usage)
		for _, s := range settings {
			if s.flag != "" {
				fmt.Fprintf(help, "  -%-15s %-18s %s%s\n", s.flag, s.env, s.is, strings.TrimSuffix(" ["+s.byDefault+"]", " []"))
			}
		}
		return c, err
	case err != nil:
		return c, badFlag(err, flags)
	case flags.NArg() > 0:
		return c, fmt.Errorf("unknown argument %q; a command goes first (wxscan -h lists them)", flags.Arg(0))
	case c.demo && given["WECHAT_APPSECRET"] != "":
		return c, errors.New("WECHAT_APPSECRET is set: with -demo anyone can log in as anyone, which does not go with a real account; unset it, or leave out -demo")
	case c.demo && (strings.HasPrefix(given["ADDR"], "unix:") || given["TLS_CERT"] != ""):
		return c, errors.New("ADDR (-addr), TLS_CERT (-tls-cert): -demo listens on plain TCP only")
	case c.demo && given["REDIS_URL"] != "":
		return c, errors.New("REDIS_URL: -demo simulates WeChat for one process alone; unset it, or leave out -demo")
	case given["REDIS_URL"] != "" && given["SESSION_SECRET"] == "":
		return c, errors.New("SESSION_SECRET is not set: with REDIS_URL, all replicas need the same (openssl rand -hex 32), to believe each other's sessions")
	case (given["TLS_CERT"] == "") != (given["TLS_KEY"] == ""):
		return c, errors.New("TLS_CERT and TLS_KEY (-tls-cert, -tls-key): set both, or neither")
	}
	var inDemo map[string]string // the defaults that are others with -demo
	if c.demo {
		given["SESSION_SECRET"] = "" // whatever production's is: a demo's sessions are good for the demo alone
		inDemo = map[string]string{"WECHAT_APPID": "wx0123456789abcdef", "WECHAT_APPSECRET": "simulated", "WECHAT_TOKEN": "simulated", "ADDR": "127.0.0.1:8080"}
	}
	for _, s := range settings {
		value, wrong := cmp.Or(given[s.env], inDemo[s.env], s.byDefault), "is malformed"
		if value == "" {
			wrong = "is not set"
		}
		if !s.set(value) {
			name := strings.TrimSuffix(s.env+" (-"+s.flag+")", " (-)")
			return c, fmt.Errorf("%s %s: it is %s; without an account, try wxscan -demo", name, wrong, s.is)
		}
	}
	return c, nil
}

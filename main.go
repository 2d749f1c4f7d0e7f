// Wxscan lets people log in to a web page by scanning a QR code with WeChat.
//
// It is one program with no database. It talks to one WeChat Official Account
// (公众号; a free test account, 测试号, is enough) and keeps everything in memory.
//
//	wxscan -demo     try it, with a simulated WeChat, on http://127.0.0.1:8080
//	wxscan           serve; the settings are in the environment
//	wxscan -h        the flags, and the environment variables behind them
//
// There are two ways to log in. In flow A the browser shows a parametric QR code
// made by WeChat, and WeChat pushes the scan to us. In flow B it shows the QR
// code of WeChat's web authorization page, and the phone brings us a code that
// says who it is. In both, the browser holds a secret ticket and asks
// /wechat/checklogin until somebody has scanned.
package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
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
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "wxscan:", err)
		os.Exit(1)
	}
}

// run serves until ctx ends. It returns an error if it cannot start.
func run(ctx context.Context, args []string, getenv func(string) string, stderr io.Writer) error {
	config, err := parseConfig(args, getenv, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	if err != nil {
		return err
	}
	var handler slog.Handler = slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: config.logLevel})
	if config.logJSON {
		handler = slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: config.logLevel})
	}
	log := slog.New(handler)
	listener, err := listen(&config, log)
	if err != nil {
		return err
	}
	if config.demo {
		config.simulate(listener.Addr().(*net.TCPAddr))
	}
	server := newServer(config, log)
	log.Info("listening", "addr", listener.Addr().String(), "url", config.publicURL)
	if getenv("SESSION_SECRET") == "" && !config.demo {
		log.Warn("SESSION_SECRET is not set: a restart logs everybody out")
	}
	if config.demo {
		server.demo = newDemo(config, server.wechat.client, server.says)
		log.Warn("DEMO: WeChat is simulated, and ANYONE CAN LOG IN AS ANYONE", "open", config.publicURL+"/")
	}
	return serve(ctx, listener, server.routes(), log)
}

// listen opens the listen address: host:port, or unix:path for a proxy on the
// same machine; with https if there is a certificate.
func listen(c *config, log *slog.Logger) (net.Listener, error) {
	network, addr := "tcp", c.addr
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		network, addr = "unix", path
		if conn, err := net.Dial(network, path); err == nil {
			conn.Close()
		} else if info, err := os.Lstat(path); err == nil && info.Mode().Type() == fs.ModeSocket {
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
	certs := &certificate{certFile: c.tlsCert, keyFile: c.tlsKey, log: log}
	if _, err := certs.get(nil); err != nil {
		return nil, fmt.Errorf("TLS_CERT and TLS_KEY (-tls-cert, -tls-key): %w", err)
	}
	return tls.NewListener(listener, &tls.Config{GetCertificate: certs.get}), nil
}

// A certificate is read from its files again when they change.
type certificate struct {
	certFile, keyFile string
	log               *slog.Logger

	mu     sync.Mutex // guards the fields below
	pair   *tls.Certificate
	change time.Time // of the files, when pair was read
}

// get returns the certificate. While the new files are unusable, the old
// certificate goes on.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var change time.Time
	for _, file := range []string{c.certFile, c.keyFile} {
		if info, err := os.Stat(file); err == nil && info.ModTime().After(change) {
			change = info.ModTime()
		}
	}
	if c.pair != nil && change.Equal(c.change) {
		return c.pair, nil
	}
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	switch {
	case err == nil:
		c.pair = &pair
	case c.pair == nil:
		return nil, err
	default:
		c.log.Warn("reading the certificate again", "err", err)
	}
	c.change = change
	return c.pair, nil
}

// serve answers requests until ctx ends, which wakes the parked polls. It
// returns once the requests in flight are answered, or shutdownGrace is over.
func serve(ctx context.Context, listener net.Listener, handler http.Handler, log *slog.Logger) error {
	server := &http.Server{
		Handler:           handler,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       readTimeout,
		WriteTimeout:      maxWait + 15*time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    32 << 10,
		ErrorLog:          stdlog.New(&errorLog{log, newLimiter(60)}, "", 0),
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }() // ends with Shutdown
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
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

const usage = `wxscan: log in to a web page by scanning a QR code with WeChat

wxscan -demo needs nothing. To serve, set WECHAT_APPID, WECHAT_APPSECRET,
WECHAT_TOKEN and PUBLIC_URL. Flags, and what sets their defaults:`

// maxTTL is WeChat's own limit for the life of a QR code, 30 days.
const maxTTL = 2592000 * time.Second

// An errorLog takes the lines of net/http. Strangers cause most of them, such as
// those of bad TLS handshakes, so they are limited.
type errorLog struct {
	log  *slog.Logger
	talk *limiter
}

func (e *errorLog) Write(line []byte) (int, error) {
	if e.talk.pass("") == 0 {
		e.log.Warn("http", "err", strings.TrimSpace(string(line)))
	}
	return len(line), nil
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
	verifyFile                string // MP_verify_xxx.txt, or none
	metricsToken              string // opens /metrics to others than loopback
	tlsCert, tlsKey           string // files, or none
	logLevel                  slog.Level
	logJSON                   bool
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

func commaSeparated(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}

// parseConfig reads the settings: secrets from the environment, the rest from
// flags, with the environment as their default. Its error is one line that
// names the setting, what is wrong with it and where to get it right; it is
// flag.ErrHelp after -h.
func parseConfig(args []string, getenv func(string) string, stderr io.Writer) (config, error) {
	c := config{
		metricsToken: getenv("METRICS_TOKEN"),
		appID:        getenv("WECHAT_APPID"), appSecret: getenv("WECHAT_APPSECRET"), token: getenv("WECHAT_TOKEN"),
		apiBase:  cmp.Or(getenv("WECHAT_API_BASE"), "https://api.weixin.qq.com"),
		openBase: cmp.Or(getenv("WECHAT_OPEN_BASE"), "https://open.weixin.qq.com"),
		mpBase:   cmp.Or(getenv("WECHAT_MP_BASE"), "https://mp.weixin.qq.com"),
	}
	flags := flag.NewFlagSet("wxscan", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	var ttl, maxTickets, maxSkew, qrRate, trusted, sessionTTL, origins, logLevel, logFormat string
	setting := func(p *string, name, env, byDefault, usage string) {
		flags.StringVar(p, name, cmp.Or(getenv(env), byDefault), usage+" ("+env+")")
	}
	flags.BoolVar(&c.demo, "demo", false, "simulate WeChat; anyone can log in as anyone")
	setting(&c.addr, "addr", "ADDR", "", "listen `address`; by default :8080, with -demo 127.0.0.1:8080")
	setting(&c.publicURL, "url", "PUBLIC_URL", "", "how phones reach us: `http(s)://host[:port]`")
	setting(&ttl, "ttl", "TICKET_TTL", "5m", "life of a QR code, a `duration` of 1s to 720h")
	setting(&maxTickets, "max-tickets", "MAX_TICKETS", "100000", "`number` of live tickets before 503")
	setting(&maxSkew, "push-max-skew", "PUSH_MAX_SKEW", "10m", "`duration` by which a push may be old or early; 0 does not look")
	setting(&qrRate, "qr-rate", "QR_RATE", "60", "`number` of QR codes a minute for one client; 0 is no limit")
	setting(&trusted, "trusted-proxies", "TRUSTED_PROXIES", "", "`CIDRs` of proxies, besides loopback, whose X-Forwarded-For counts")
	setting(&sessionTTL, "session-ttl", "SESSION_TTL", "24h", "life of a session, a `duration` of 1m to 8760h")
	confirm, confirmErr := strconv.ParseBool(cmp.Or(getenv("CONFIRM"), "false"))
	flags.BoolVar(&c.confirm, "confirm", confirm, "a scan must be confirmed on the phone (CONFIRM)")
	setting(&origins, "allowed-origins", "ALLOWED_ORIGINS", "", "`origins` of other front ends, exact, comma-separated")
	setting(&c.verifyFile, "verify-file", "WECHAT_VERIFY_FILE", "", "`name` of the file that proves a domain, MP_verify_xxx.txt")
	setting(&logLevel, "log-level", "LOG_LEVEL", "info", "`level`: debug, info, warn or error")
	setting(&logFormat, "log-format", "LOG_FORMAT", "text", "`format` of the log: text or json")
	setting(&c.tlsCert, "tls-cert", "TLS_CERT", "", "`file` with the certificate chain, for https; read again when it changes")
	setting(&c.tlsKey, "tls-key", "TLS_KEY", "", "`file` with its key")
	setting(&c.scope, "scope", "WECHAT_SCOPE", "snsapi_base", "`scope` of flow B: snsapi_base, or snsapi_userinfo for nickname and avatar")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintln(stderr, usage)
		flags.SetOutput(stderr)
		flags.PrintDefaults()
		return c, err
	case err != nil:
		return c, fmt.Errorf("%w (wxscan -h lists the flags)", err)
	case flags.NArg() > 0:
		return c, fmt.Errorf("unknown argument %q (wxscan -h lists the flags)", flags.Arg(0))
	}
	if c.demo && c.appSecret != "" {
		return c, errors.New("WECHAT_APPSECRET is set: with -demo anyone can log in as anyone, which does not go with a real account; unset it, or leave out -demo")
	}
	if c.demo {
		c.appID, c.appSecret, c.token = cmp.Or(c.appID, "wx0123456789abcdef"), "simulated", cmp.Or(c.token, "simulated")
		c.addr = cmp.Or(c.addr, "127.0.0.1:8080")
		if strings.HasPrefix(c.addr, "unix:") || c.tlsCert != "" {
			return c, errors.New("ADDR (-addr), TLS_CERT (-tls-cert): -demo listens on plain TCP only, as host:port")
		}
	}
	c.addr = cmp.Or(c.addr, ":8080")
	for _, base := range []*string{&c.publicURL, &c.apiBase, &c.openBase, &c.mpBase} {
		*base = strings.TrimSuffix(*base, "/")
	}
	matches := func(pattern, value string) bool {
		ok, _ := regexp.MatchString(`^(`+pattern+`)$`, value)
		return ok
	}
	aesKey := getenv("WECHAT_AES_KEY")
	var errs [7]error
	c.aesKey, errs[0] = parseAESKey(aesKey)
	c.ttl, errs[1] = time.ParseDuration(ttl)
	c.maxTickets, errs[2] = strconv.Atoi(maxTickets)
	c.maxSkew, errs[3] = time.ParseDuration(maxSkew)
	c.qrRate, errs[4] = strconv.Atoi(qrRate)
	c.sessionTTL, errs[6] = time.ParseDuration(sessionTTL)
	secret := getenv("SESSION_SECRET")
	c.sessionSecrets = strings.Split(cmp.Or(secret, rand.Text()+rand.Text()), ",")
	c.allowedOrigins = commaSeparated(origins)
	for _, cidr := range commaSeparated(trusted) {
		prefix, err := netip.ParsePrefix(cidr)
		c.trusted, errs[5] = append(c.trusted, prefix.Masked()), cmp.Or(errs[5], err)
	}
	const (
		origin  = `https?://([0-9A-Za-z.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?`
		account = "on the account's page, for a test account https://mp.weixin.qq.com/debug/cgi-bin/sandbox?t=sandbox/login"
		base    = "http(s)://host[:port][/path], or unset for WeChat's own"
	)
	for _, setting := range []struct {
		name, value string
		ok          bool
		mustBe      string
	}{
		{"WECHAT_APPID", c.appID, matches(`wx[0-9A-Za-z]+`, c.appID), "the appID (wx and letters and digits) " + account},
		{"WECHAT_APPSECRET", c.appSecret, matches(`[0-9A-Za-z]+`, c.appSecret), "the appsecret (letters and digits) " + account},
		{"WECHAT_TOKEN", c.token, matches(`[0-9A-Za-z]{3,32}`, c.token), "the Token (3-32 letters and digits) that you make up and type into the interface configuration (接口配置信息) " + account},
		{"WECHAT_AES_KEY", aesKey, aesKey == "" || errs[0] == nil, "the EncodingAESKey (43 letters and digits) " + account + ", or unset for plain mode"},
		{"PUBLIC_URL (-url)", c.publicURL, matches(origin, c.publicURL) || c.demo && c.publicURL == "", "http(s)://host[:port] without a path, where phones and WeChat reach this server, such as your ngrok address"},
		{"TICKET_TTL (-ttl)", ttl, errs[1] == nil && c.ttl%time.Second == 0 && c.ttl > 0 && c.ttl <= maxTTL, "a duration such as 5m, whole seconds, from 1s to 720h"},
		{"MAX_TICKETS (-max-tickets)", maxTickets, errs[2] == nil && c.maxTickets > 0, "a number from 1"},
		{"PUSH_MAX_SKEW (-push-max-skew)", maxSkew, errs[3] == nil && c.maxSkew >= 0, "a duration such as 10m, or 0"},
		{"QR_RATE (-qr-rate)", qrRate, errs[4] == nil && c.qrRate >= 0 && c.qrRate <= 1000, "a number from 0 to 1000"},
		{"TRUSTED_PROXIES (-trusted-proxies)", trusted, errs[5] == nil, "CIDRs such as 10.0.0.0/8,fd00::/8"},
		{"SESSION_SECRET", secret, !slices.ContainsFunc(c.sessionSecrets, func(s string) bool { return len(s) < 32 }), "at least 32 bytes, or several such, comma-separated: openssl rand -hex 32 makes one"},
		{"SESSION_TTL (-session-ttl)", sessionTTL, errs[6] == nil && c.sessionTTL%time.Second == 0 && c.sessionTTL >= time.Minute && c.sessionTTL <= 8760*time.Hour, "a duration such as 24h, whole seconds, from 1m to 8760h"},
		{"CONFIRM (-confirm)", getenv("CONFIRM"), confirmErr == nil, "true or false"},
		{"ALLOWED_ORIGINS (-allowed-origins)", origins, !slices.ContainsFunc(c.allowedOrigins, func(o string) bool { return !matches(origin, o) }), "exact origins such as https://www.example.com, comma-separated; * is none"},
		{"WECHAT_VERIFY_FILE (-verify-file)", c.verifyFile, matches(`(MP_verify_[0-9A-Za-z]+\.txt)?`, c.verifyFile), "the name of the file from the account's page, MP_verify_xxx.txt"},
		{"LOG_LEVEL (-log-level)", logLevel, c.logLevel.UnmarshalText([]byte(logLevel)) == nil, "debug, info, warn or error"},
		{"LOG_FORMAT (-log-format)", logFormat, matches("text|json", logFormat), "text or json"},
		{"TLS_CERT and TLS_KEY (-tls-cert, -tls-key)", c.tlsCert + c.tlsKey, (c.tlsCert == "") == (c.tlsKey == ""), "both set, or neither"},
		{"WECHAT_SCOPE (-scope)", c.scope, matches(`snsapi_(base|userinfo)`, c.scope), "snsapi_base or snsapi_userinfo"},
		{"WECHAT_API_BASE", c.apiBase, matches(origin+`(/[!-~]*)?`, c.apiBase), base},
		{"WECHAT_OPEN_BASE", c.openBase, matches(origin+`(/[!-~]*)?`, c.openBase), base},
		{"WECHAT_MP_BASE", c.mpBase, matches(origin+`(/[!-~]*)?`, c.mpBase), base},
	} {
		switch {
		case setting.ok:
		case setting.value == "":
			return c, fmt.Errorf("%s is not set: it must be %s; without an account, try wxscan -demo", setting.name, setting.mustBe)
		default:
			return c, fmt.Errorf("%s is malformed: it must be %s; without an account, try wxscan -demo", setting.name, setting.mustBe)
		}
	}
	c.logJSON = logFormat == "json"
	return c, nil
}

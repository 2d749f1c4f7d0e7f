package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	maxWait = 30       // seconds, of a poll
	maxBody = 64 << 10 // bytes; a push has less than one KiB

	plainText = "text/plain; charset=utf-8"
)

var (
	errNothingHere = errors.New("nothing here")
	errRateLimited = errors.New("too many requests")
	errNoTicket    = errors.New("no ticket")
	errMethod      = errors.New("no such method here")
)

// A server answers browsers, phones and WeChat.
type server struct {
	config  config
	log     *slog.Logger
	tickets *store
	pushes  *store        // the digests of their bodies, by signature
	local   *localRecords // where the tickets are without REDIS_URL
	seen    *localRecords // and the pushes
	redis   *redis        // where both are with it, else nil
	wechat  *wechat
	signer  *signer
	parked  parking // polls
	metrics metrics
	demo    http.Handler // the simulator, or nil

	badSignatures *guessGuard // of pushes and URL checks, by client
	wrongDigits   *guessGuard // of flow C, by sender
	qrLimit       limiter     // who asks for QR codes, by client
	pictureLimit  limiter     // who has them drawn, by client
	badOAuthCodes limiter     // that WeChat calls invalid, by client
	apiCodesSent  limiter     // codes of wechat-server's protocol, by their receiver
	wrongAPICodes limiter     // of all its clients together
	logLimit      limiter     // log lines that strangers can cause, by kind
}

func newServer(c config, log *slog.Logger) *server {
	s := &server{
		config: c,
		log:    log,
		local:  &localRecords{max: int64(c.maxTickets)},
		seen:   &localRecords{max: maxPushes},
		wechat: newWeChat(&c, log),
		signer: &signer{secrets: c.sessionSecrets, issuer: c.publicURL, audience: c.appID, ttl: c.sessionTTL,
			allowedOrigins: c.allowedOrigins},
		parked:  parking{tickets: make(map[key]int), clients: make(map[string]int)},
		metrics: metrics{counts: make(map[string]int)},

		badSignatures: newGuessGuard(maxWrong, maxAllWrong, time.Minute),
		wrongDigits:   newGuessGuard(maxWrongDigits, maxAllWrongDigits, 10*time.Minute),
		qrLimit:       limiter{rate: c.qrRate, window: time.Minute},
		pictureLimit:  limiter{rate: 10 * c.qrRate, window: time.Minute},
		badOAuthCodes: limiter{rate: 10, window: time.Minute},
		apiCodesSent:  limiter{rate: maxAPICodesSent, window: time.Minute},
		wrongAPICodes: limiter{rate: maxWrongAPICodes, window: time.Minute},
		logLimit:      limiter{rate: 600, window: time.Minute},
	}
	s.tickets = newStore(c.ttl, s.local)
	s.pushes = newStore(0, s.seen)
	if c.redisURL != nil {
		s.redis = newRedis(c.redisURL, c.redisCA, c.redisPrefix, log)
		s.tickets.records, s.tickets.lookAgain = s.redis, lookAgain
		s.pushes = s.tickets
	}
	s.tickets.confirm = c.confirm
	s.tickets.onStatus = s.logStatus
	s.wechat.called = func(path, result string) {
		s.metrics.count("wxscan_wechat_calls_total{path=%q,result=%q}", path, result)
	}
	return s
}

// work does what is to be done besides answering requests, until ctx ends.
func (s *server) work(ctx context.Context) {
	var all sync.WaitGroup
	if s.redis == nil {
		all.Go(func() { s.local.sweep(ctx, s.logStatus) })
		all.Go(func() { s.seen.sweep(ctx, s.logStatus) })
	} else {
		waiting := &s.tickets.waiting
		all.Go(func() { s.redis.watch(ctx, func(name string) { waiting.wake(parseKey(name)) }, waiting.wakeAll) })
		all.Go(func() { s.redis.watchHealth(ctx) })
	}
	all.Wait()
}

// A handler answers a request, or returns an error while nothing is written.
type handler func(http.ResponseWriter, *http.Request) error

// routes is the whole URL surface.
func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, h handler) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if err := h(w, r); err != nil {
				s.fail(w, r, err)
			}
		})
	}
	acts := func(pattern string, h handler) { // whose GET does something, which HEAD must not
		handle(pattern, h)
		handle("HEAD"+strings.TrimPrefix(pattern, "GET"), func(w http.ResponseWriter, r *http.Request) error {
			w.Header().Set("Allow", http.MethodGet)
			return errMethod
		})
	}
	handle("GET /wechat/message", s.verifyURL)
	handle("GET /wechat/message/{$}", s.verifyURL)
	handle("POST /wechat/message", s.receive)
	handle("POST /wechat/message/{$}", s.receive)
	if s.config.appSecret != "" {
		acts("GET /wechat/getloginqr", s.notElsewhere(s.limited(s.beginScan)))
		acts("GET /wechat/getauthqr", s.notElsewhere(s.limited(s.beginAuth)))
	}
	if s.config.offers(flowCode) {
		acts("GET /wechat/getlogincode", s.notElsewhere(s.limited(s.beginCode)))
	}
	handle("GET /wechat/qr.png", s.draw)
	handle("GET /wechat/qr.svg", s.draw)
	handle("GET /wechat/qr.txt", s.draw)
	handle("GET /wechat/checklogin", s.poll)
	acts("GET /wechat/accessusercode", s.callback)
	handle("GET /wechat/confirm", s.showConfirm)
	handle("POST /wechat/confirm", s.takeAnswer)
	handle("GET /wechat/session", s.session)
	handle("POST /wechat/logout", s.logout)
	handle("GET /{$}", s.loginPage)
	handle("GET /static/", s.page)
	handle("GET /healthz", s.health)
	handle("GET /readyz", s.ready)
	handle("GET /metrics", s.showMetrics)
	if s.config.apiToken != "" {
		handle("GET /api/wechat", s.verifyURL)
		handle("GET /api/wechat/{$}", s.verifyURL)
		handle("POST /api/wechat", s.receive)
		handle("POST /api/wechat/{$}", s.receive)
		acts("GET /api/wechat/user", s.tellUser)
		if s.config.appSecret != "" {
			handle("GET /api/wechat/qrcode", s.limited(s.drawCodeQR))
		}
	}
	if s.config.verifyFile != "" {
		handle("GET /"+s.config.verifyFile, s.ownership)
	}
	if s.demo != nil {
		mux.Handle("/demo/", http.MaxBytesHandler(s.demo, maxBody))
	}
	handle("/", func(w http.ResponseWriter, r *http.Request) error { return nothing(mux, w, r) })
	return s.guard(mux)
}

// nothing is for what no other pattern of mux matches: an unknown path, or a
// method that the path does not have.
func nothing(mux *http.ServeMux, w http.ResponseWriter, r *http.Request) error {
	var allowed []string
	for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPost} {
		other := &http.Request{Method: method, Host: r.Host, URL: r.URL}
		if _, pattern := mux.Handler(other); pattern != r.Pattern && !strings.HasPrefix(pattern, "HEAD ") {
			allowed = append(allowed, method)
		}
	}
	if allowed == nil {
		return errNothingHere
	}
	w.Header().Set("Allow", strings.Join(allowed, ", "))
	return errMethod
}

// limited lets no client through to h too often.
func (s *server) limited(h handler) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		if err := s.pass(&s.qrLimit, w, r); err != nil {
			return err
		}
		return h(w, r)
	}
}

// pass returns errRateLimited, and has the answer say for how long, if the
// client of a request may not pass a limiter now.
func (s *server) pass(l *limiter, w http.ResponseWriter, r *http.Request) error {
	if wait := l.pass(shares(client(r, s.config.trusted))...); wait > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(ceil(wait)))
		return errRateLimited
	}
	return nil
}

// A qrAnswer is a new ticket, for the browser alone that asked for it.
type qrAnswer struct {
	Ticket      string `json:"ticket"`
	Code        string `json:"code,omitzero"`        // flow C: the digits
	QRURL       string `json:"qrUrl,omitzero"`       // our picture; flow C: the account's, with WECHAT_ACCOUNT
	WeChatQRURL string `json:"wechatQrUrl,omitzero"` // flow A: WeChat's own
	URL         string `json:"url,omitzero"`         // what our picture says
	ExpiresIn   int    `json:"expiresIn"`            // seconds
}

// beginScan begins flow A. The scene is the ticket's digest: WeChat's own ticket
// can be computed from the picture, so it is nobody's secret.
func (s *server) beginScan(w http.ResponseWriter, r *http.Request) error {
	if err := s.tickets.records.ready(); err != nil {
		return err // before a call is wasted on it
	}
	ticket := rand.Text()
	wechatTicket, qr, err := s.wechat.createQR(r.Context(), digest(ticket).String(), s.config.ttl)
	if err != nil {
		return err
	}
	return s.begin(w, r, flowScan, qr, qrAnswer{Ticket: ticket, QRURL: s.pictureURL(ticket),
		WeChatQRURL: s.wechat.qrImageURL(wechatTicket), URL: qr})
}

func (s *server) pictureURL(ticket string) string {
	return s.config.publicURL + "/wechat/qr.png?ticket=" + ticket
}

// begin gives a browser its ticket. shown is kept, for the code to be drawn from again.
func (s *server) begin(w http.ResponseWriter, r *http.Request, f flow, shown string, answer qrAnswer) error {
	if err := s.tickets.begin(r.Context(), answer.Ticket, f, shown, s.asker(r)); err != nil {
		return err
	}
	answer.ExpiresIn = int(s.config.ttl.Seconds())
	return writeJSON(w, http.StatusOK, answer)
}

// poll answers where a login stands: at once, or with wait=S as soon as there is
// news, after S seconds at most. A wait that is no number, or negative, is none,
// and so is one that finds no place to park.
func (s *server) poll(w http.ResponseWriter, r *http.Request) error {
	query := r.URL.Query()
	if !query.Has("ticket") {
		return errNoTicket
	}
	k, mayKeep := digest(query.Get("ticket")), s.signer.mayKeep(r)
	if seconds, _ := strconv.Atoi(query.Get("wait")); seconds > 0 {
		d := time.Duration(min(seconds, maxWait)) * time.Second
		if err := s.waitForNews(r, k, d, status(query.Get("status"))); err != nil {
			return err // while Redis is away, a second look would take as long again
		}
	}
	return s.answerPoll(r.Context(), w, k, mayKeep)
}

// waitForNews parks a poll until its ticket has a status other than seen, or other than
// the present one if seen is "". Keep records out of this chain of calls: one on the
// stack makes it 8 KiB in place of 4, and a parked poll take 22 kB in place of 19.
func (s *server) waitForNews(r *http.Request, k key, d time.Duration, seen status) error {
	leave, ok := s.parked.park(r, k, client(r, s.config.trusted))
	if !ok {
		return nil
	}
	defer leave()
	return s.tickets.wait(r.Context(), k, d, func(now *record) bool {
		seen = cmp.Or(seen, now.Status)
		return now.Status != seen
	})
}

// A pollAnswer tells a browser where its login stands. What does not apply is
// left out.
type pollAnswer struct {
	Login     bool   `json:"login"`
	Status    status `json:"status"`
	ExpiresIn int    `json:"expiresIn,omitzero"` // seconds, rounded up
	login
	Token  string `json:"token,omitzero"`  // a session
	Number string `json:"number,omitzero"` // that the phone shows too, to be confirmed
}

// answerPoll answers a poll of the ticket with key k. With mayKeep a session is
// set as a cookie too.
func (s *server) answerPoll(ctx context.Context, w http.ResponseWriter, k key, mayKeep bool) error {
	ticket, err := s.tickets.look(ctx, k)
	if err != nil {
		return err
	}
	answer := pollAnswer{Login: ticket.Status == statusDone, Status: ticket.Status}
	switch ticket.Status {
	case statusPending:
		answer.ExpiresIn = ceil(ticket.left())
	case statusScanned:
		answer.Number, answer.ExpiresIn = number(k), ceil(ticket.left())
	case statusDone:
		answer.login = ticket.Login
		id := digest("session of " + k.String()).String()
		if answer.Token, err = s.signer.sign(ticket.Login, ticket.Since, id); err != nil {
			return err
		}
		if mayKeep {
			http.SetCookie(w, s.signer.cookie(answer.Token))
		}
	}
	return writeJSON(w, http.StatusOK, answer)
}

// ceil returns whole seconds, rounded up.
func ceil(d time.Duration) int { return int(math.Ceil(d.Seconds())) }

// fail answers a request that its handler gave up, and logs it. Clients get a
// code and plain words, never an error's own text.
func (s *server) fail(w http.ResponseWriter, r *http.Request, err error) {
	const loud, quiet = slog.LevelWarn, slog.LevelDebug
	status, level := http.StatusInternalServerError, loud
	answer := struct {
		Error   string `json:"error"`
		Message string `json:"message"`
		ErrCode int    `json:"errcode,omitzero"`
	}{"internal", "something went wrong here; the server's log says what", 0}
	for _, known := range []struct {
		err           error
		status        int
		level         slog.Level
		code, message string
	}{
		{errSignature, 403, loud, "bad_signature", "the signature is missing or wrong"},
		{errTooLarge, 413, loud, "too_large", "the body is too large"},
		{errPush, 400, loud, "bad_push", "the body is not a push of WeChat's"},
		{errNoTicket, 400, loud, "missing_ticket", "the parameter ticket is missing"},
		{errNoSession, 401, quiet, "no_session", "not logged in, or no longer"},
		{errCrossOrigin, 403, loud, "cross_origin", "another site may not ask for this"},
		{errNothingHere, 404, quiet, "not_found", "there is nothing here, or no longer"},
		{errMethod, 405, quiet, "method_not_allowed", "not with this method; Allow says which"},
		{errRateLimited, 429, loud, "rate_limited", "too many QR codes in a minute; try again shortly"},
		{errGuessing, 429, loud, "rate_limited", "too many wrong signatures; try again in a minute"},
		{errNotTaken, 500, quiet, "store_unavailable", "the push cannot be taken now; send it again"},
		{errStoreUnavailable, 503, quiet, "store_unavailable", "logins cannot be kept just now; try again shortly"},
		{errTooManyTickets, 503, loud, "too_many_tickets", "too many people are logging in; try again shortly"},
		{errTimeout, 504, loud, "wechat_timeout", "WeChat did not answer in time; try again"},
		{errUnreachable, 502, loud, "wechat_unreachable", "WeChat cannot be reached; try again"},
		{errRefused, 502, loud, "wechat_refused", "WeChat refused; the server's log says why"},
	} {
		if errors.Is(err, known.err) {
			status, level, answer.Error, answer.Message = known.status, known.level, known.code, known.message
			break
		}
	}
	if refused, ok := errors.AsType[*apiError](err); ok {
		answer.ErrCode = refused.code
	}
	switch {
	case errors.Is(err, errGuessing):
		w.Header().Set("Retry-After", "60")
	case status == http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "5")
	}
	if s.logLimit.allows(answer.Error) {
		s.log.Log(r.Context(), level, "request failed", "route", r.Pattern, "status", status, "err", err, hint(err))
	}
	writeJSON(w, status, answer)
}

// writeJSON is how all JSON leaves.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	var body bytes.Buffer
	encoder := json.NewEncoder(&body)
	encoder.SetEscapeHTML(false) // people copy URLs, with their &, from a terminal
	if err := encoder.Encode(v); err != nil {
		return err
	}
	return write(w, status, "application/json", body.Bytes())
}

// write ends a handler: whether the client is still there is not its concern.
func write(w http.ResponseWriter, status int, contentType string, body []byte) error {
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	w.Write(body)
	return nil
}

package main

import (
	"bytes"
	"crypto/subtle"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// metrics holds the counters for Prometheus (text format 0.0.4).
type metrics struct {
	mu     sync.Mutex     // guards counts
	counts map[string]int // by series
}

// count adds one to a series, such as wxscan_tickets_total{flow="scan"}.
func (m *metrics) count(format string, args ...any) {
	series := fmt.Sprintf(format, args...)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.counts[series]++
}

// logEvent logs and counts the new status of a ticket. The first digits of its key
// tie the lines of one login together.
func (s *server) logEvent(k key, r record) {
	if s.logLimit.pass(one(string(r.Status))) == 0 {
		s.log.Info("login "+string(r.Status), "login", k.String()[:8], "flow", r.Flow)
	}
	switch r.Status {
	case statusPending:
		s.metrics.count("wxscan_tickets_total{flow=%q}", r.Flow)
	case statusDone, statusDeclined, statusExpired:
		s.metrics.count("wxscan_logins_total{flow=%q,outcome=%q}", r.Flow, r.Status)
	}
}

// showMetrics answers with all metrics, if the request has METRICS_TOKEN. A loopback
// peer proves nothing: it may be a proxy, for anybody.
func (s *server) showMetrics(w http.ResponseWriter, r *http.Request) error {
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if want := s.config.metricsToken; want == "" || subtle.ConstantTimeCompare([]byte(token), []byte(want)) != 1 {
		return errNothingHere
	}
	var page bytes.Buffer
	about := func(name, kind, help string) {
		fmt.Fprintf(&page, "# HELP %[1]s %[3]s\n# TYPE %[1]s %[2]s\n", name, kind, help)
	}
	m := &s.metrics
	m.mu.Lock()
	counts := maps.Clone(m.counts)
	m.mu.Unlock()
	for _, counter := range [][2]string{
		{"wxscan_tickets_total", "QR codes made, by flow."},
		{"wxscan_logins_total", "Ends of logins, by flow and outcome."},
		{"wxscan_wechat_calls_total", "Calls of WeChat's API, by path and result."},
	} {
		about(counter[0], "counter", counter[1])
		for _, series := range slices.Sorted(maps.Keys(counts)) {
			if strings.HasPrefix(series, counter[0]+"{") {
				fmt.Fprintln(&page, series, counts[series])
			}
		}
	}
	gauge := func(name, help string, value any) {
		about(name, "gauge", help)
		fmt.Fprintln(&page, name, value)
	}
	gauge("wxscan_waiting_browsers", "Polls that wait for a scan.", s.parked.count())
	if s.redis == nil {
		gauge("wxscan_live_tickets", "Tickets that wait, or whose result can be read.", s.local.count.Load())
	}
	up := 1
	if errors.Is(s.tickets.records.ready(), errStoreUnavailable) {
		up = 0
	}
	gauge("wxscan_store_up", "1 while logins can be kept, 0 while Redis is away.", up)
	gauge("wxscan_access_token_age_seconds", "Age of the access token; 0 without one.", s.wechat.tokenAge().Seconds())
	return write(w, http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", page.Bytes())
}

func (s *server) health(w http.ResponseWriter, r *http.Request) error {
	return write(w, http.StatusOK, plainText, []byte("ok"))
}

// ready tells a balancer whether logins can be kept: with REDIS_URL they cannot
// while Redis is away.
func (s *server) ready(w http.ResponseWriter, r *http.Request) error {
	if err := s.tickets.records.ready(); errors.Is(err, errStoreUnavailable) {
		return err
	}
	return s.health(w, r)
}
